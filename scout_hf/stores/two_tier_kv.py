"""Two-tier KV of one layer: whole blocks in host memory, the newest tokens on the device. Write-back only appends."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from scout_hf.errors import SessionError
from scout_hf.stores.packed import make_store
from scout_hf.stores.state import State, count_in, state_in, tensor_in
from scout_hf.stores.streams import Links, Mark


class Tail(NamedTuple):
    """The newest tokens, on the device; one object, because its parts change together.

    first, tokens : int
        Position of the first token of the tail, and number of tokens.
    buffer : Tensor (2, batch, kv_heads, capacity, head_dim)
        Keys and values, with spare capacity.
    spoiled : Tensor or None
        The buffer of an earlier tail that is being overwritten.
    has_filled : callable or None
        Whether the device has moved the oldest block to the host; None while it is not asked to.
    """

    first: int
    tokens: int
    buffer: torch.Tensor
    spoiled: torch.Tensor | None = None
    has_filled: Callable[[], bool] | None = None


class TwoTierKV:
    """The newest tokens in a tail on the device, all older ones in host pages; no token is stored twice.

    Parameters
    ----------
    batch, heads, head_dim, block_size : int
        Rows, KV heads (not query heads), channels per head, tokens per block.
    dtype : torch.dtype
    device : torch.device or str
        Of the model's keys and values, and of the tail.
    host_dtype : "int8" or None
        Data type of the host pages; None for ``dtype``.

    Attributes
    ----------
    host : PagedKV
    written : Mark
        The end of the last write-back: nothing on the host may read its blocks before.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.stores import TwoTierKV
    >>> kv = TwoTierKV(batch=1, heads=2, head_dim=8, block_size=4, dtype=torch.float32, device="cpu")
    >>> keys = torch.randn(1, 2, 14, 8)
    >>> kv.append(keys, keys)
    >>> _ = kv.write_back(window_blocks=1)
    >>> kv.host.length, kv.length
    (8, 14)
    >>> bool((kv.read(0, 14)[0] == keys).all())
    True
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        host_dtype: str | None = None,
    ):
        self.block_size, self.device = block_size, torch.device(device)
        pinned = self.device.type == "cuda"
        self.host = make_store(batch, heads, head_dim, block_size, dtype, "cpu", host_dtype, pinned)
        self.written = Mark()
        self._tail = Tail(0, 0, torch.empty((2, batch, heads, 0, head_dim), dtype=dtype, device=device))
        # The buffer, the tokens and the views that tail_blocks() gave last.
        self._in_blocks: tuple[torch.Tensor, int, tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def batch(self) -> int:
        """Rows."""
        return self._tail.buffer.shape[1]

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self._tail.first + self._tail.tokens

    @property
    def device_bytes(self) -> int:
        """Bytes of the tail's buffer."""
        return self._tail.buffer.numel() * self._tail.buffer.element_size()

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append new tokens, (batch, kv_heads, tokens, head_dim) each, to the tail; the host is not written."""
        first, here, buffer, *_ = self._tail
        tokens = here + keys.shape[2]
        if tokens > buffer.shape[3]:
            grown = self._reserve(tokens)
            grown[:, :, :, :here] = buffer[:, :, :, :here]
            buffer = grown
        buffer[0, :, :, here:tokens] = keys
        buffer[1, :, :, here:tokens] = values
        self._tail = Tail(first, tokens, buffer)

    def grew(self, tokens: int) -> None:
        """Count ``tokens`` tokens that a kernel has written into :meth:`buffers`."""
        self._tail = self._tail._replace(tokens=self._tail.tokens + tokens)

    def overdue(self, window_blocks: int) -> int:
        """Whole blocks of the tail beyond the newest ``window_blocks``."""
        return self._tail.tokens // self.block_size - window_blocks

    def filling(self, has_filled: Callable[[], bool]) -> None:
        """The device is about to move the oldest block to the host's reserved page, within the same buffer.

        Until ``filled`` or ``unfilled``, a rollback asks ``has_filled``.
        """
        self._tail = self._tail._replace(has_filled=has_filled)

    def filled(self) -> None:
        """The device was told to move that block."""
        first, tokens, buffer, *_ = self._tail
        self.host.filled(first + self.block_size)
        self._tail = Tail(first + self.block_size, tokens - self.block_size, buffer)

    def unfilled(self) -> None:
        """The device was not told to."""
        self._tail = self._tail._replace(has_filled=None)

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tail's buffers, (batch, kv_heads, capacity, head_dim) each; capacity is a whole number of blocks."""
        return self._tail.buffer[0], self._tail.buffer[1]

    def tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tail, views of (batch, kv_heads, tail, head_dim)."""
        _, tokens, buffer, *_ = self._tail
        return buffer[0, :, :, :tokens], buffer[1, :, :, :tokens]

    def tail_blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tail in blocks, views (batch, kv_heads, n, block_size, head_dim); undefined behind the last token."""
        buffer, used = self._tail.buffer, -(-self._tail.tokens // self.block_size) * self.block_size
        if self._in_blocks is None or self._in_blocks[0] is not buffer or self._in_blocks[1] != used:
            keys, values = buffer[:, :, :, :used].unflatten(3, (-1, self.block_size))
            self._in_blocks = buffer, used, (keys, values)
        return self._in_blocks[2]

    def full_blocks(self, window_blocks: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The tail's whole blocks except the newest ``window_blocks``; None if there are none.

        Keys and values, views of (batch, kv_heads, n * block_size, head_dim) each.
        """
        count = self.overdue(window_blocks)
        if count <= 0:
            return None
        keys, values = self.tail()
        return keys[:, :, : count * self.block_size], values[:, :, : count * self.block_size]

    def write_back(self, window_blocks: int, links: Links | None = None, in_place: bool = False) -> Mark:
        """Move the ``full_blocks`` to the host. Never call it while a CPU job of this layer is in flight.

        Parameters
        ----------
        window_blocks : int
            Newest whole blocks that stay on the device.
        links : Links or None
            Copy asynchronously, on the write-back stream; None to block.
        in_place : bool
            Keep the same tail buffer, whose address a captured graph holds.

        Returns
        -------
        Mark
            The end of the copies, which ``written`` is too.
        """
        blocks = self.full_blocks(window_blocks)
        if blocks is None:
            return Mark()
        first, tokens, buffer, *_ = self._tail
        moved, mark = blocks[0].shape[2], Mark()
        left, capacity = tokens - moved, (window_blocks + 2) * self.block_size
        # Everything that can fail comes before the host store grows.
        rest = self._reserve(capacity)
        rest[:, :, :, :left] = buffer[:, :, :, moved:tokens]
        if links is None:
            self.host.append(blocks[0].to("cpu"), blocks[1].to("cpu"))
        else:
            self.written = mark = self.host.append_beside(*blocks, links)
        if not in_place or buffer.shape[3] != capacity:
            self._tail = Tail(first + moved, left, rest)
            return mark
        self._tail = Tail(first + moved, left, rest, spoiled=buffer)
        buffer[:, :, :, :left] = rest[:, :, :, :left]
        self._tail = Tail(first + moved, left, buffer)
        return mark

    def mark(self) -> Tail:
        """The current state for ``rollback``, by reference (no copies)."""
        return self._tail

    def rollback(self, mark: Tail) -> None:
        """Restore the state of ``mark``, also after an interrupted append or write-back."""
        if self._tail.has_filled is not None:
            self.filled() if self._tail.has_filled() else self.unfilled()
        now = self._tail
        # Tokens that are in both tiers belong to an interrupted write-back.
        self.host.crop(now.first)
        if now.first != mark.first and (now.buffer is mark.buffer or now.spoiled is mark.buffer):
            self.crop(mark.first + mark.tokens)
            return
        self.host.crop(mark.first)
        self._tail = mark

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of tokens ``start:stop`` on the device: keys and values, (batch, kv_heads, stop - start, head_dim)."""
        border = self.host.length
        keys, values = self.tail()
        tail = (keys[:, :, max(start - border, 0) : max(stop - border, 0)],
                values[:, :, max(start - border, 0) : max(stop - border, 0)])  # fmt: skip
        if start >= border:
            return tail[0].clone(), tail[1].clone()
        held = [part.to(self.device) for part in self.host.read(start, min(stop, border))]
        if stop <= border:
            return held[0], held[1]
        return torch.cat([held[0], tail[0]], dim=2), torch.cat([held[1], tail[1]], dim=2)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens; if that cuts a host block, its rest moves back to the tail."""
        first, tokens, buffer, *_ = self._tail
        if length >= first:
            self._tail = Tail(first, min(tokens, length - first), buffer)
            return
        first = length // self.block_size * self.block_size
        part = torch.stack(self.host.read(first, length)).to(self.device)
        buffer = self._reserve(max(buffer.shape[3], length - first))
        buffer[:, :, :, : length - first] = part
        self.host.crop(first)
        self._tail = Tail(first, length - first, buffer)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``."""
        buffer = self._tail.buffer[:, rows.to(self.device)]
        self.host.select_rows(rows)
        self._tail = self._tail._replace(buffer=buffer)

    def fork(self) -> TwoTierKV:
        """A second store that shares the host pages, copy on write, with its own copy of the tail."""
        tail = self._tail._replace(buffer=self._tail.buffer.clone())
        twin = object.__new__(TwoTierKV)
        twin.__dict__.update(self.__dict__, host=self.host.fork(), _tail=tail, _in_blocks=None)
        return twin

    def state_dict(self) -> State:
        """Both tiers, as views that are valid until the next change; no write-back may be in flight."""
        _, tokens, buffer, *_ = self._tail
        return {"host": self.host.state_dict(), "tail": buffer[:, :, :, :tokens], "capacity": buffer.shape[3]}

    def load_state_dict(self, state: State) -> None:
        """Fill an empty store with what :meth:`state_dict` gave; SessionError if it does not fit."""
        like, host = self._tail.buffer, state_in(state, "host")
        tail = tensor_in(state, "tail", (*like.shape[:3], None, like.shape[4]), like.dtype)
        tokens, first = tail.shape[3], count_in(host, "length")
        if first % self.block_size or count_in(state, "capacity", tokens + first + (1 << 20)) < tokens:
            raise SessionError(f"a tail of {tokens} tokens behind {first} of the host does not fit")
        buffer = self._reserve(state["capacity"])
        buffer[:, :, :, :tokens] = tail
        self.host.load_state_dict(host)
        self._tail = Tail(first, tokens, buffer)

    def _reserve(self, tokens: int) -> torch.Tensor:
        """A tail buffer for at least ``tokens`` tokens, of undefined content."""
        like = self._tail.buffer
        return like.new_empty((*like.shape[:3], -(-tokens // self.block_size) * self.block_size, like.shape[4]))
