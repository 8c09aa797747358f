"""Two tiers of one layer: whole blocks in host memory, the newest tokens on the device. Write-back is append-only."""

from __future__ import annotations

import torch

from scout_hf.stores.link import Links, Mark
from scout_hf.stores.packed import make_store


class TwoTierKV:
    """Host pages for tokens ``[0, host.length)``, a device tail for ``[host.length, length)``; nothing is held twice.

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
        self, batch: int, heads: int, head_dim: int, block_size: int, dtype: torch.dtype, device, host_dtype=None
    ):
        self.block_size, self.device = block_size, torch.device(device)
        pinned = self.device.type == "cuda"
        self.host = make_store(batch, heads, head_dim, block_size, dtype, "cpu", host_dtype, pinned)
        self._buffer = torch.empty((2, batch, heads, 0, head_dim), dtype=dtype, device=device)
        self._tail = 0

    @property
    def batch(self) -> int:
        """Rows."""
        return self._buffer.shape[1]

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.host.length + self._tail

    @property
    def device_bytes(self) -> int:
        """Bytes of the tail's buffer."""
        return self._buffer.numel() * self._buffer.element_size()

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put new tokens into the tail; (batch, kv_heads, tokens, head_dim) each. Nothing moves to the host."""
        tokens = keys.shape[2]
        if self._tail + tokens > self._buffer.shape[3]:
            room = -(-(self._tail + tokens) // self.block_size) * self.block_size
            grown = self._buffer.new_empty((*self._buffer.shape[:3], room, self._buffer.shape[4]))
            grown[:, :, :, : self._tail] = self._buffer[:, :, :, : self._tail]
            self._buffer = grown
        self._buffer[0, :, :, self._tail : self._tail + tokens] = keys
        self._buffer[1, :, :, self._tail : self._tail + tokens] = values
        self._tail += tokens

    def grew(self, tokens: int) -> None:
        """So many tokens have been put into :meth:`room` by others."""
        self._tail += tokens

    def room(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tail's whole buffers, (batch, kv_heads, room, head_dim) each, a whole number of blocks."""
        return self._buffer[0], self._buffer[1]

    def tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tail, views of (batch, kv_heads, tail, head_dim)."""
        return self._buffer[0, :, :, : self._tail], self._buffer[1, :, :, : self._tail]

    def tail_blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The tail in blocks, views of (batch, kv_heads, n, block_size, head_dim); the end of the last is undefined."""
        used = -(-self._tail // self.block_size) * self.block_size
        keys, values = self._buffer[:, :, :, :used].unflatten(3, (-1, self.block_size))
        return keys, values

    def full_blocks(self, window_blocks: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The whole blocks of the tail that are older than the newest ``window_blocks`` whole ones, or None."""
        count = self._tail // self.block_size - window_blocks
        if count <= 0:
            return None
        keys, values = self.tail()
        return keys[:, :, : count * self.block_size], values[:, :, : count * self.block_size]

    def write_back(self, window_blocks: int, links: Links | None = None) -> Mark:
        """Move what ``full_blocks`` names to the host, once; never called between a job's start and its join.

        With ``links`` beside what else the device does: nothing on the host may read those blocks before the mark.
        """
        blocks = self.full_blocks(window_blocks)
        if blocks is None:
            return Mark()
        moved, mark = blocks[0].shape[2], Mark()
        left = self._tail - moved
        room = (window_blocks + 2) * self.block_size
        # All that may fail comes before the store grows.
        rest, buffer = self._buffer[:, :, :, moved : self._tail], self._buffer
        if buffer.shape[3] == room:
            # A captured step knows this buffer.
            rest = rest.clone()
        else:
            buffer = buffer.new_empty((*buffer.shape[:3], room, buffer.shape[4]))
        if links is None:
            self.host.append(blocks[0].to("cpu"), blocks[1].to("cpu"))
        else:
            mark = self.host.append_beside(*blocks, links)
        buffer[:, :, :, :left] = rest
        self._buffer, self._tail = buffer, left
        return mark

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
        if length >= self.host.length:
            self._tail = min(self._tail, length - self.host.length)
            return
        whole = length // self.block_size * self.block_size
        keys, values = self.host.read(whole, length)
        self.host.crop(whole)
        self._tail = 0
        self.append(keys.to(self.device), values.to(self.device))

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row ``i`` what row ``rows[i]`` was."""
        self.host.select_rows(rows)
        self._buffer = self._buffer[:, rows.to(self._buffer.device)]

    def fork(self) -> TwoTierKV:
        """A second store that shares the host pages, copy on write, and has a tail of its own."""
        twin = object.__new__(TwoTierKV)
        twin.__dict__.update(self.__dict__, host=self.host.fork(), _buffer=self._buffer.clone())
        return twin
