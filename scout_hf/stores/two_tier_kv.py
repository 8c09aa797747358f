"""Two tiers of one layer: whole blocks in host memory, the newest tokens on the device. Write-back is append-only."""

from __future__ import annotations

from typing import NamedTuple

import torch

from scout_hf.stores.packed import make_store
from scout_hf.stores.streams import Links, Mark


class Tail(NamedTuple):
    """The newest tokens, on the device; one object, since it changes as a whole.

    first, tokens : int
        The first token that is here and not on the host, and how many there are.
    buffer : Tensor (2, batch, kv_heads, capacity, head_dim)
        Keys and values, with spare capacity.
    spoiled : Tensor or None
        The buffer of an earlier tail that is being written over.
    """

    first: int
    tokens: int
    buffer: torch.Tensor
    spoiled: torch.Tensor | None = None


class TwoTierKV:
    """Host pages for the tokens before the tail, a device tail for the others; nothing is held twice.

    Parameters
    ----------
    batch, heads, head_dim, block_size : int
        KV heads, not query heads; tokens per block.
    dtype, device
        Of the keys and values as the model makes them.
    host_dtype : "int8" or None
        What the host keeps; None for the same.
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
        self._tail = Tail(0, 0, torch.empty((2, batch, heads, 0, head_dim), dtype=dtype, device=device))

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
        """Put new tokens into the tail; (batch, kv_heads, tokens, head_dim) each. Nothing moves to the host."""
        first, here, buffer, _ = self._tail
        tokens = here + keys.shape[2]
        if tokens > buffer.shape[3]:
            grown = self._reserve(tokens)
            grown[:, :, :, :here] = buffer[:, :, :, :here]
            buffer = grown
        buffer[0, :, :, here:tokens] = keys
        buffer[1, :, :, here:tokens] = values
        self._tail = Tail(first, tokens, buffer)

    def grew(self, tokens: int) -> None:
        """So many tokens have been put into :meth:`buffers` by others."""
        self._tail = self._tail._replace(tokens=self._tail.tokens + tokens)

    def buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tail's whole buffers, (batch, kv_heads, capacity, head_dim) each, a whole number of blocks."""
        return self._tail.buffer[0], self._tail.buffer[1]

    def tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tail, views of (batch, kv_heads, tail, head_dim)."""
        _, tokens, buffer, _ = self._tail
        return buffer[0, :, :, :tokens], buffer[1, :, :, :tokens]

    def tail_blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tail in blocks, views of (batch, kv_heads, n, block_size, head_dim); the end of the last is undefined."""
        used = -(-self._tail.tokens // self.block_size) * self.block_size
        keys, values = self._tail.buffer[:, :, :, :used].unflatten(3, (-1, self.block_size))
        return keys, values

    def full_blocks(self, window_blocks: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The whole blocks of the tail that are older than the newest ``window_blocks`` whole ones, or None."""
        count = self._tail.tokens // self.block_size - window_blocks
        if count <= 0:
            return None
        keys, values = self.tail()
        return keys[:, :, : count * self.block_size], values[:, :, : count * self.block_size]

    def write_back(self, window_blocks: int, links: Links | None = None, in_place: bool = False) -> Mark:
        """Move what ``full_blocks`` names to the host, once; never called between a job's start and its join.

        With ``links`` beside what else the device does: nothing on the host may read those blocks before the mark.
        ``in_place`` for a captured step, which knows the buffer: it stays the same one.
        """
        blocks = self.full_blocks(window_blocks)
        if blocks is None:
            return Mark()
        first, tokens, buffer, _ = self._tail
        moved, mark = blocks[0].shape[2], Mark()
        left, capacity = tokens - moved, (window_blocks + 2) * self.block_size
        # All that may fail comes before the store grows.
        rest = self._reserve(capacity)
        rest[:, :, :, :left] = buffer[:, :, :, moved:tokens]
        if links is None:
            self.host.append(blocks[0].to("cpu"), blocks[1].to("cpu"))
        else:
            mark = self.host.append_beside(*blocks, links)
        if not in_place or buffer.shape[3] != capacity:
            self._tail = Tail(first + moved, left, rest)
            return mark
        self._tail = Tail(first + moved, left, rest, spoiled=buffer)
        buffer[:, :, :, :left] = rest[:, :, :, :left]
        self._tail = Tail(first + moved, left, buffer)
        return mark

    def mark(self) -> Tail:
        """The present state, to go back to; holds no copy of anything."""
        return self._tail

    def rollback(self, mark: Tail) -> None:
        """Be what it was at the mark, wherever an append or a write-back after it was interrupted."""
        now = self._tail
        # What is on the host and still in the tail was on its way there.
        self.host.crop(now.first)
        if now.first != mark.first and (now.buffer is mark.buffer or now.spoiled is mark.buffer):
            self.crop(mark.first + mark.tokens)
            return
        self.host.crop(mark.first)
        self._tail = mark

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens ``start:stop`` on the device, (batch, kv_heads, stop - start, head_dim) each.

        Newly made: the tail's buffer moves on.
        """
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
        """Keep the first ``length`` tokens; a block cut in two comes back to the tail."""
        first, tokens, buffer, _ = self._tail
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
        """Make row ``i`` what row ``rows[i]`` was."""
        buffer = self._tail.buffer[:, rows.to(self.device)]
        self.host.select_rows(rows)
        self._tail = self._tail._replace(buffer=buffer)

    def fork(self) -> TwoTierKV:
        """A second store that shares the host pages, copy on write, and has a tail of its own."""
        tail = self._tail._replace(buffer=self._tail.buffer.clone())
        twin = object.__new__(TwoTierKV)
        twin.__dict__.update(self.__dict__, host=self.host.fork(), _tail=tail)
        return twin

    def _reserve(self, tokens: int) -> torch.Tensor:
        """A buffer for at least so many tokens, of undefined content."""
        like = self._tail.buffer
        return like.new_empty((*like.shape[:3], -(-tokens // self.block_size) * self.block_size, like.shape[4]))
