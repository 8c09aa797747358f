"""A read-only snapshot of a store's whole blocks."""

from __future__ import annotations

import torch

from scout_hf.stores.host import PagedKV
from scout_hf.stores.packed import unpack


class WholeBlocks:
    """The whole blocks that a PagedKV has now, without its partly filled last block.

    It holds references to the pages: they are copied on write, and not recycled before this object is deleted. So
    another thread may read them while the store is changed, cropped, reordered, forked or deleted.

    Parameters
    ----------
    store : PagedKV

    Attributes
    ----------
    blocks, tokens : int
        Per row.
    """

    def __init__(self, store: PagedKV):
        self.heads, self.head_dim, self.block_size = store.heads, store.head_dim, store.block_size
        self.dtype, self.device, self.packed, self.library = store.dtype, store.device, store.packed, store.library
        self.blocks = store.length // store.block_size
        store.touch(None)
        self._table = store.table.fork()
        self._table.truncate(self.blocks)

    @property
    def tokens(self) -> int:
        return self.blocks * self.block_size

    def addresses(self, row: int, head: int) -> torch.Tensor:
        """Memory addresses of the tiles of one KV head of one row, (blocks,) of int64."""
        tile_bytes = self._table.pool.page_bytes // self.heads
        return self._table.addresses[row] + head * tile_bytes

    def read(self, row: int, head: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of blocks ``first:last``: keys and values, (last - first, block_size, head_dim) each."""
        shape = (last - first, self.block_size, self.head_dim)
        keys, values = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        for slab, here, local in self._table.pool.by_slab(self._table.ids[row, first:last]):
            tiles = slab[local, head]
            plain = unpack(tiles, self.block_size, self.head_dim, self.dtype) if self.packed else tiles.unbind(1)
            keys[here], values[here] = plain
        return keys, values
