"""Resident blocks of one layer: a fixed number of block slots on the device (ScoutAttention, section 3.1)."""

from __future__ import annotations

from typing import Any

import torch

from scout_hf.errors import SessionError
from scout_hf.kernels.cpu.protocols import PagedStore
from scout_hf.stores.state import State, count_in, flag_in, ids_in, tensor_in

EMPTY = -1


class ResidentSlots:
    """Block slots per row and KV head; they fill from the front.

    Parameters
    ----------
    batch, heads, slots, block_size, head_dim : int
        Rows, KV heads, slots per row and KV head, tokens per block, channels per head.
    dtype : torch.dtype
    device : torch.device

    Attributes
    ----------
    keys, values : Tensor (batch, kv_heads, slots, block_size, head_dim)
    ids : Tensor (batch, kv_heads, slots) of int64
        The block in each slot, ``EMPTY`` for none (rows of a padded batch have fewer blocks than others).
    filled : int
        Leading slots in use.
    gaps : bool
        Whether one of those may be empty.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.stores import PagedKV, ResidentSlots
    >>> host = PagedKV(1, 1, 8, 4, torch.float32, "cpu")
    >>> host.append(*torch.randn(2, 1, 1, 16, 8))
    >>> slots = ResidentSlots(1, 1, 2, 4, 8, torch.float32, torch.device("cpu"))
    >>> best = torch.tensor([[[3, 0, 1]]])
    >>> slots.load(best, torch.ones_like(best, dtype=torch.bool), host)
    2
    >>> slots.ids.tolist()
    [[[3, 0]]]
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
        self.ids = torch.full(shape[:3], EMPTY, dtype=torch.int64, device=device)
        self.filled = 0
        self.gaps = False

    @property
    def slots(self) -> int:
        """Slots per row and head."""
        return self.ids.shape[2]

    @property
    def used_bytes(self) -> int:
        """Bytes of all slots, used or not."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def content(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the slots in use, (batch, kv_heads, filled * block_size, head_dim) each."""
        return self.keys[:, :, : self.filled].flatten(2, 3), self.values[:, :, : self.filled].flatten(2, 3)

    def holds(self, ids: torch.Tensor, blocks: int) -> torch.Tensor:
        """Which of ``ids`` (batch, kv_heads, n), all below ``blocks``, are resident; bool of the same shape."""
        present = torch.zeros((*ids.shape[:2], blocks + 1), dtype=torch.bool, device=ids.device)
        here = self.ids[:, :, : self.filled]
        present.scatter_(2, torch.where(here == EMPTY, blocks, here), True)
        return present.gather(2, ids)

    def among(self, chosen: torch.Tensor, valid: torch.Tensor, blocks: int) -> torch.Tensor:
        """Which slots hold one of the valid ``chosen`` blocks, (batch, kv_heads, n); bool (batch, kv_heads, slots)."""
        is_chosen = torch.zeros((*chosen.shape[:2], blocks + 1), dtype=torch.bool, device=chosen.device)
        is_chosen.scatter_(2, torch.where(valid, chosen, blocks), True)
        is_chosen[:, :, blocks] = False
        return is_chosen.gather(2, torch.where(self.ids == EMPTY, blocks, self.ids))

    def load(self, ids: torch.Tensor, valid: torch.Tensor, host: PagedStore) -> int:
        """Replace the content of all slots by blocks of the host.

        Parameters
        ----------
        ids : Tensor (batch, kv_heads, n) of int64
            Block numbers, best first; those beyond the number of slots are ignored.
        valid : Tensor (batch, kv_heads, n) of bool
            False for entries to ignore.
        host : PagedKV

        Returns
        -------
        int
            Blocks copied, over all rows and KV heads.
        """
        count = min(ids.shape[2], self.slots)
        chosen, valid = ids[:, :, :count], valid[:, :, :count]
        keys, values = _fetch(host, torch.where(valid, chosen, 0))
        # Ids last: a slot must never name a block that it does not hold yet.
        self.ids.fill_(EMPTY)
        self.keys[:, :, :count] = keys
        self.values[:, :, :count] = values
        self.filled, self.gaps = count, not bool(valid.all())
        self.ids[:, :, :count] = torch.where(valid, chosen, EMPTY)
        return int(valid.sum())

    def adopt(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy block ``first``, which is leaving the tail, into a free slot of every row and KV head that has one.

        ``keys`` and ``values`` are (batch, kv_heads, block_size, head_dim), on the device.
        """
        if not self.gaps:
            if self.filled < self.slots:
                self.keys[:, :, self.filled], self.values[:, :, self.filled] = keys, values
                self.ids[:, :, self.filled] = first
                self.filled += 1
            return
        free = self.ids == EMPTY
        rows, heads = free.any(2).nonzero(as_tuple=True)
        slots = free.to(torch.int8).argmax(2)[rows, heads]
        self.keys[rows, heads, slots], self.values[rows, heads, slots] = keys[rows, heads], values[rows, heads]
        self.ids[rows, heads, slots] = first
        self.filled = max(self.filled, int(slots.max()) + 1 if len(slots) else 0)

    def plan_recall(self, chosen: torch.Tensor, valid: torch.Tensor, blocks: int) -> Recall | None:
        """Assign slots of blocks that are not chosen to chosen blocks that are missing; the data follows later.

        Parameters
        ----------
        chosen : Tensor (batch, kv_heads, n) of int64
            Block numbers below ``blocks``, best first.
        valid : Tensor (batch, kv_heads, n) of bool
            False for entries to ignore.
        blocks : int

        Returns
        -------
        Recall or None
            The transfer; those slots are undefined until it has run. None if nothing is missing.
        """
        missing = valid & ~self.holds(chosen, blocks)
        leaving = ~self.among(chosen, valid, blocks)
        pairs = int(torch.minimum(missing.sum(2), leaving.sum(2)).max())
        if not pairs:
            return None
        incoming = missing.to(torch.int8).argsort(dim=2, descending=True, stable=True)[:, :, :pairs]
        # Empty slots first, then slots of blocks that are not chosen now.
        rank = leaving.to(torch.int8) + (self.ids == EMPTY)
        slots = rank.argsort(dim=2, descending=True, stable=True)[:, :, :pairs]
        real = missing.gather(2, incoming) & leaving.gather(2, slots)
        ids = chosen.gather(2, incoming)
        self.ids.scatter_(2, slots, torch.where(real, ids, self.ids.gather(2, slots)))
        self.filled = self.slots if bool((self.ids != EMPTY).any(0).any(0)[self.filled :].any()) else self.filled
        self.gaps = self.gaps or bool((self.ids[:, :, : self.filled] == EMPTY).any())
        return Recall(self, ids, slots, real)

    def grow(self, slots: int) -> None:
        """Enlarge to ``slots`` slots; the new ones are empty."""
        self.keys, self.values, self.ids = more_slots(slots, self.keys, self.values, self.ids)

    def crop(self, blocks: int) -> None:
        """Empty the slots of blocks from ``blocks`` on."""
        gone = self.ids >= blocks
        if bool(gone.any()):
            self.gaps = True
            self.ids.masked_fill_(gone, EMPTY)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``."""
        rows = rows.to(self.ids.device)
        self.keys, self.values, self.ids = self.keys[rows], self.values[rows], self.ids[rows]

    def fork(self) -> ResidentSlots:
        """An independent copy."""
        twin = object.__new__(ResidentSlots)
        twin.__dict__.update(self.__dict__)
        twin.keys, twin.values, twin.ids = self.keys.clone(), self.values.clone(), self.ids.clone()
        return twin

    def state_dict(self, host: PagedStore | None) -> State:
        """Which blocks are in which slots, as views, and their content unless ``host`` has just that."""
        return {"ids": self.ids, "filled": self.filled, "gaps": self.gaps} | content_of(self, host)

    def load_state_dict(self, state: State, host: PagedStore | None, blocks: int) -> None:
        """Fill new slots with what :meth:`state_dict` gave, of ``blocks`` blocks; SessionError if it does not fit."""
        ids = ids_in(state, "ids", tuple(self.ids.shape), EMPTY, blocks)
        filled, gaps = count_in(state, "filled", self.slots), flag_in(state, "gaps")
        if bool((ids[:, :, filled:] != EMPTY).any()) or (not gaps and bool((ids[:, :, :filled] == EMPTY).any())):
            raise SessionError("the residents that are named and those that are counted differ")
        load_content(self, state, host, ids)
        self.filled, self.gaps, self.ids = filled, gaps, ids.to(self.ids.device, copy=True)


def content_of(slots: Any, host: PagedStore | None) -> State:
    """Keys and values of slots, unless an unpacked ``host`` has the same; packed, it has them rounded."""
    return {} if host is not None and not host.packed else {"keys": slots.keys, "values": slots.values}


def load_content(slots: Any, state: State, host: PagedStore | None, ids: torch.Tensor) -> None:
    """Fill new slots with the content that was saved, else with blocks ``ids`` of ``host``."""
    shape, dtype = tuple(slots.keys.shape), slots.keys.dtype
    if host is None or host.packed:
        content = [tensor_in(state, name, shape, dtype) for name in ("keys", "values")]
    elif ids.numel() and host.blocks:
        content = list(_fetch(host, ids.clamp(min=0)))
    else:
        return
    slots.keys.copy_(content[0])
    slots.values.copy_(content[1])


class Recall:
    """A planned recall of host blocks into slots; call ``run`` once, on any thread, to copy the data."""

    def __init__(self, resident: ResidentSlots, ids: torch.Tensor, slots: torch.Tensor, real: torch.Tensor):
        self.resident, self.ids, self.slots, self.real = resident, ids, slots, real
        self.blocks = int(real.sum())
        self.moved_bytes = self.blocks * 2 * resident.keys[0, 0, 0].numel() * resident.keys.element_size()

    def addresses(self, host: PagedStore) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """The copies of ``run`` as raw memory: source addresses, target addresses, bytes of each copy.

        None if the blocks must be unpacked or the slots are not on the CPU.
        """
        slots = self.resident.keys
        if host.library is None or host.packed or not slots.is_cpu or slots.dtype != host.dtype:
            return None
        host.touch(torch.where(self.real, self.ids, host.blocks))
        half = slots[0, 0, 0].nbytes
        rows, heads, which = self.real.nonzero(as_tuple=True)
        tiles = host.table.addresses[rows, self.ids[rows, heads, which]] + heads * (2 * half)
        places = ((rows * slots.shape[1] + heads) * slots.shape[2] + self.slots[rows, heads, which]) * half
        targets = [places + self.resident.keys.data_ptr(), places + self.resident.values.data_ptr()]
        return torch.cat([tiles, tiles + half]), torch.cat(targets), half

    def run(self, host: PagedStore) -> None:
        """Copy the blocks from ``host`` (a PagedKV). Nothing may read these slots before the recall is joined."""
        keys, values = _fetch(host, self.ids)
        self.put(keys[self.real], values[self.real])

    def put(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Fill the slots; ``keys`` and ``values`` (n, block_size, head_dim) are in the order of ``real.nonzero()``."""
        rows, heads, which = self.real.nonzero(as_tuple=True)
        slots = self.slots[rows, heads, which]
        self.resident.keys[rows, heads, slots] = keys
        self.resident.values[rows, heads, slots] = values

    def forget(self) -> None:
        """Cancel the recall: mark its slots as empty."""
        rows, heads, which = self.real.nonzero(as_tuple=True)
        self.resident.gaps = True
        self.resident.ids[rows, heads, self.slots[rows, heads, which]] = EMPTY


def more_slots(slots: int, keys: torch.Tensor, values: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
    """The three tensors enlarged to ``slots`` in dimension 2; the new slots are empty."""
    grown = []
    for held, empty in ((keys, 0), (values, 0), (ids, EMPTY)):
        fresh = held.new_full((*held.shape[:2], slots - held.shape[2], *held.shape[3:]), empty)
        grown.append(torch.cat([held, fresh], dim=2))
    return grown


def _fetch(host: PagedStore, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (*ids.shape, host.block_size, host.head_dim)
    keys, values = (torch.empty(shape, dtype=host.dtype, device=host.device) for _ in range(2))
    host.gather(ids.cpu(), keys, values)
    return keys.to(ids.device), values.to(ids.device)
