"""Resident slots with their bookkeeping on the device, so that a decode step needs no host sync."""

from __future__ import annotations

import torch

from scout_hf.errors import SessionError
from scout_hf.kernels.cpu.protocols import PagedStore
from scout_hf.stores.resident_slots import EMPTY, content_of, load_content, more_slots
from scout_hf.stores.state import State, count_in, maybe_count_in, tensor_in

SPARE_BLOCKS = 64


class MappedSlots:
    """Block slots per row and KV head, with maps from slot to block and from block to slot.

    Parameters
    ----------
    batch, heads, slots, block_size, head_dim : int
        Rows, KV heads, slots per row and KV head, tokens per block, channels per head.
    dtype : torch.dtype
    device : torch.device

    Attributes
    ----------
    keys, values : Tensor (batch, kv_heads, slots, block_size, head_dim)
    ids : Tensor (batch, kv_heads, slots) of int32
        The block in each slot, ``EMPTY`` for none.
    slot_of : Tensor (batch, kv_heads, capacity) of int32
        The slot of each block, ``EMPTY`` for none; with spare capacity.
    filled : int or None
        Leading slots in use; None if that differs between rows or heads, or only the device knows it.
    least : int
        Slots in use in every row and head at least.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        slots: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        shape = (batch, heads, slots, block_size, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.ids = torch.full(shape[:3], EMPTY, dtype=torch.int32, device=device)
        self.slot_of = torch.full((batch, heads, 0), EMPTY, dtype=torch.int32, device=device)
        self.filled: int | None = 0
        self.least = 0
        self._blocks = 0  # no slot holds a block from here on

    @property
    def slots(self) -> int:
        """Slots per row and head."""
        return self.ids.shape[2]

    @property
    def used_bytes(self) -> int:
        """Bytes of all slots and maps, used or not."""
        numbers = self.ids.numel() + self.slot_of.numel()
        return 2 * self.keys.numel() * self.keys.element_size() + 4 * numbers

    def reserve(self, blocks: int) -> None:
        """Enlarge ``slot_of`` to at least ``blocks`` blocks."""
        if blocks > self.slot_of.shape[2]:
            capacity = blocks + max(SPARE_BLOCKS, blocks // 8)
            grown = torch.full((*self.ids.shape[:2], capacity), EMPTY, dtype=torch.int32, device=self.ids.device)
            grown[:, :, : self.slot_of.shape[2]] = self.slot_of
            self.slot_of = grown

    def adopting(self, first: int) -> None:
        """Note that block ``first`` may be in a slot from now on."""
        self._blocks = max(self._blocks, first + 1)

    def adopted(self, first: int) -> None:
        """Note that block ``first`` was copied into an empty slot of every row and KV head that had one."""
        self.least = min(self.least + 1, self.slots)
        if self.filled is not None or self.least == self.slots:
            self.filled = self.least
        self._blocks = max(self._blocks, first + 1)

    def recalled(self, blocks: int) -> None:
        """Note that a recall may have filled empty slots with blocks below ``blocks``."""
        self._blocks = max(self._blocks, blocks)
        if self.filled is not None and self.filled < self.ids.shape[2]:
            self.filled = None

    def clear(self, blocks: int) -> None:
        """Empty all slots, for a context of ``blocks`` blocks."""
        self.reserve(blocks)
        self.ids.fill_(EMPTY)
        self.slot_of.fill_(EMPTY)
        self.filled, self.least, self._blocks = 0, 0, blocks

    def loaded(self, blocks: int | None) -> None:
        """Note that so many slots were filled in every row and head; None: it differs, or is not known."""
        self.filled, self.least = blocks, blocks or 0

    def grow(self, slots: int) -> None:
        """Enlarge to ``slots`` slots; the new ones are empty, residents keep their slots."""
        self.keys, self.values, self.ids = more_slots(slots, self.keys, self.values, self.ids)

    def crop(self, blocks: int) -> None:
        """Empty the slots of blocks from ``blocks`` on."""
        if blocks < self._blocks:
            self.filled, self.least = None, max(0, self.least - (self._blocks - blocks))
            self.ids.masked_fill_(self.ids >= blocks, EMPTY)
            self.slot_of[:, :, blocks:] = EMPTY
            self._blocks = blocks

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``."""
        rows = rows.to(self.ids.device)
        parts = (self.keys, self.values, self.ids, self.slot_of)
        self.keys, self.values, self.ids, self.slot_of = (part[rows] for part in parts)

    def fork(self) -> MappedSlots:
        """An independent copy."""
        twin = object.__new__(MappedSlots)
        twin.__dict__.update(self.__dict__)
        for name in ("keys", "values", "ids", "slot_of"):
            setattr(twin, name, getattr(self, name).clone())
        return twin

    def state_dict(self, host: PagedStore | None) -> State:
        """Which blocks are in which slots, as views, and their content unless ``host`` has just that."""
        return {"ids": self.ids, "filled": self.filled, "blocks": self._blocks} | content_of(self, host)

    def load_state_dict(self, state: State, host: PagedStore | None, blocks: int) -> None:
        """Fill new slots with what :meth:`state_dict` gave, of ``blocks`` blocks; SessionError if it does not fit."""
        ids = tensor_in(state, "ids", tuple(self.ids.shape), torch.int32)
        filled, held = maybe_count_in(state, "filled", self.slots), count_in(state, "blocks", blocks)
        if ids.numel() and not EMPTY <= int(ids.min()) <= int(ids.max()) < held:
            raise SessionError(f"residents outside of {held} blocks are named")
        self.reserve(blocks)
        load_content(self, state, host, ids.to(torch.int64).cpu())
        here = ids.to(self.ids.device, copy=True)
        slot_of = torch.full((*here.shape[:2], self.slot_of.shape[2] + 1), EMPTY, dtype=torch.int32, device=here.device)
        slots = torch.arange(self.slots, dtype=torch.int32, device=here.device).expand_as(here)
        slot_of.scatter_(2, torch.where(here == EMPTY, self.slot_of.shape[2], here).long(), slots)
        self.slot_of = slot_of[:, :, :-1].contiguous()
        self.filled, self._blocks, self.ids = filled, held, here
        self.least = int((ids != EMPTY).sum(2).min()) if ids.numel() else 0
