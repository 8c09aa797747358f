"""The hidden states that entered a layer, stored so that keys and values can be recomputed."""

from __future__ import annotations

from typing import Any

import torch

from scout_hf.errors import SessionError
from scout_hf.stores import PagedKV, TwoTierKV
from scout_hf.stores.state import State, count_in, flag_in, state_in
from scout_hf.stores.streams import Links, Mark


class LayerInputs:
    """Hidden states of tokens ``[0, length)`` and their positions.

    They are stored in pages as one KV head: the first half of the channels as keys, the second half as values.

    Parameters
    ----------
    hidden : Tensor (batch, tokens, hidden_size)
        The first hidden states, for sizes, dtype and device. Not stored.
    block_size : int
    on_host : bool
        Write whole blocks back to the host; if False, everything stays on the device.

    Attributes
    ----------
    written : Mark
        The end of the last write-back; wait for it before reading the host.
    """

    def __init__(self, hidden: torch.Tensor, block_size: int, on_host: bool):
        batch, _, self.hidden_size = hidden.shape
        self.block_size, self.dtype = block_size, hidden.dtype
        half, device = self.hidden_size // 2, hidden.device
        sizes = (batch, 1, half, block_size, hidden.dtype, device)
        self.store: TwoTierKV | PagedKV = TwoTierKV(*sizes) if on_host else PagedKV(*sizes)
        self.written = Mark()
        # (first token, positions) of each append; None in a model without position ids.
        self._positions: list[tuple[int, torch.Tensor]] | None = []

    @property
    def host(self) -> PagedKV | None:
        """The host store of whole blocks; None if everything stays on the device."""
        return self.store.host if isinstance(self.store, TwoTierKV) else None

    @property
    def blocks(self) -> int:
        """Whole blocks that can be recomputed from."""
        return (self.store if self.host is None else self.host).length // self.block_size

    def append(self, hidden: torch.Tensor, position_ids: torch.Tensor | None, first: int) -> None:
        """Append tokens from position ``first`` on; ignored unless they follow the stored ones."""
        if first != self.store.length:
            return
        halves = hidden.to(self.dtype).unflatten(2, (2, -1))
        if position_ids is None:
            self._positions = None
        elif self._positions is not None:
            # An append that failed may have left positions.
            while self._positions and self._positions[-1][0] >= first:
                self._positions.pop()
            self._positions.append((first, position_ids.to(self.store.device)))
        self.store.append(halves[:, None, :, 0], halves[:, None, :, 1])

    def write_back(self, host_length: int, links: Links | None = None) -> None:
        """Write whole blocks back up to ``host_length`` tokens; on a side stream with ``links``."""
        if isinstance(self.store, TwoTierKV) and (tail := self.store.length - host_length) >= 0:
            links = links if self.store.device.type == "cuda" else None
            self.written = self.store.write_back(tail // self.block_size, links)

    def read(self, tokens: int) -> torch.Tensor:
        """The first ``tokens`` hidden states, (batch, tokens, hidden_size) on the device."""
        self.written.finish()
        return self.joined(self.store.read(0, tokens))

    @staticmethod
    def joined(halves: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Join two halves, (batch, 1, tokens, hidden_size / 2) each, to hidden states (batch, tokens, hidden_size)."""
        return torch.cat([half[:, 0] for half in halves], dim=-1)

    def positions(self, tokens: int) -> torch.Tensor | None:
        """Position ids of the first ``tokens``, (1 or batch, tokens[, axes]); None in a model without position ids."""
        if self._positions is None:
            return None
        if self._positions[0][1].shape[1] < tokens:
            rows = max(len(part) for _, part in self._positions)
            self._positions = [
                (0, torch.cat([part.expand(rows, *part.shape[1:]) for _, part in self._positions], dim=1))
            ]
        return self._positions[0][1][:, :tokens]

    def state_dict(self) -> State:
        """All hidden states and positions, as views that are valid until the next change."""
        self.written.finish()
        known = self._positions is not None
        return {
            "hidden_size": self.hidden_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "known": known,
            "positions": self.positions(self.store.length) if known and self._positions else None,
            "store": self.store.state_dict(),
        }

    @classmethod
    def of_state(cls, state: State, batch: int, block_size: int, on_host: bool, device: torch.device) -> LayerInputs:
        """What :meth:`state_dict` gave; SessionError if it does not fit."""
        dtype = getattr(torch, str(state.get("dtype")), None)
        size = count_in(state, "hidden_size", 1 << 24)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or not size or size % 2:
            raise SessionError(f"inputs of {size} channels of {state.get('dtype')!r} are not possible")
        made = cls(torch.empty((batch, 0, size), dtype=dtype, device=device), block_size, on_host)
        made.store.load_state_dict(state_in(state, "store"))
        if not flag_in(state, "known"):
            made._positions = None
        elif (positions := state.get("positions")) is not None:
            if not isinstance(positions, torch.Tensor) or positions.shape[:1] not in ((1,), (batch,)):
                raise SessionError("positions of inputs do not fit the rows")
            made._positions = [(0, positions.to(device, copy=True))]
        return made

    def tier_bytes(self) -> dict[str, int]:
        """Bytes per tier."""
        if isinstance(self.store, TwoTierKV):
            return {"host": self.store.host.used_bytes, "device": self.store.device_bytes}
        return {"device": self.store.used_bytes}

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        length = min(length, self.store.length)
        self.written.finish()
        self.store.crop(length)
        self._cut_positions()

    def mark(self) -> Any:
        """The current state for ``rollback``, by reference (no copies)."""
        return self.store.mark() if isinstance(self.store, TwoTierKV) else self.store.length

    def rollback(self, mark: Any) -> None:
        """Restore the state of ``mark``, also after an interrupted append or write-back."""
        self.written.finish()
        if isinstance(self.store, TwoTierKV):
            self.store.rollback(mark)
        else:
            self.store.crop(mark)
        self._cut_positions()

    def _cut_positions(self) -> None:
        if self._positions and (kept := self.positions(self.store.length)) is not None:
            self._positions = [(0, kept)]

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``."""
        self.store.select_rows(rows)
        if self._positions and (all_of_it := self.positions(self.store.length)) is not None:
            self._positions = [(0, all_of_it if len(all_of_it) == 1 else all_of_it[rows.to(all_of_it.device)])]

    def fork(self) -> LayerInputs:
        """An independent copy that shares pages, copy on write."""
        twin = object.__new__(LayerInputs)
        positions = None if self._positions is None else list(self._positions)
        twin.__dict__.update(self.__dict__, store=self.store.fork(), _positions=positions)
        return twin
