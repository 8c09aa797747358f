"""Page tables of a batch, which share pages by reference count."""

from __future__ import annotations

import torch

from scout_hf.stores.pages import PagePool
from scout_hf.stores.state import Pages


class PageTable:
    """The page table of a batch: the pages of each row, in order.

    Rows and tables may share pages by reference count. Call ``own_last`` before writing to the last page of a row
    (copy on write).

    Parameters
    ----------
    pool : PagePool
    batch : int
        Rows.

    Attributes
    ----------
    ids : Tensor (batch, blocks) of int64, on the CPU
        Page ids.
    addresses : Tensor (batch, blocks) of int64, on the CPU
        Memory addresses of the pages.
    places : Tensor (2, batch, capacity) of int64, on the CPU
        Ids and addresses with spare capacity. Replaced, never resized: a job in flight may still read the old tensor.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.stores import PagePool, PageTable
    >>> table = PageTable(PagePool((4,), torch.float32, torch.device("cpu")), batch=2)
    >>> table.extend(3).shape
    torch.Size([2, 3])
    >>> twin = table.fork()
    >>> bool((twin.ids == table.ids).all()), table.pool.used_pages
    (True, 6)
    """

    def __init__(self, pool: PagePool, batch: int):
        self.pool = pool
        self.places = torch.empty((2, batch, 0), dtype=torch.int64, device="cpu")
        self.blocks = 0
        self._last_is_ours = True

    @property
    def ids(self) -> torch.Tensor:
        """Page ids, (batch, blocks) of int64 on the CPU."""
        return self.places[0, :, : self.blocks]

    @property
    def addresses(self) -> torch.Tensor:
        """Memory addresses of the pages, (batch, blocks) of int64 on the CPU."""
        return self.places[1, :, : self.blocks]

    @property
    def batch(self) -> int:
        """Rows."""
        return self.places.shape[1]

    def extend(self, blocks: int) -> torch.Tensor:
        """Append ``blocks`` new pages to every row and return their ids, (batch, blocks)."""
        new = self.pool.allocate(self.batch * blocks).view(self.batch, blocks)
        addresses, places = self.pool.addresses(new), self.places
        first, last = self.blocks, self.blocks + blocks
        if last > places.shape[2]:
            # A new array, not a resized one: a job in flight may still read the old one.
            places = places.new_empty((2, self.batch, last + max(8, last // 2)))
            places[:, :, :first] = self.places[:, :, :first]
        places[0, :, first:last] = new
        places[1, :, first:last] = addresses
        self.places = places
        self.blocks = last
        self._last_is_ours = True
        return new

    def truncate(self, blocks: int) -> None:
        """Keep the first ``blocks`` pages of every row."""
        if blocks < self.blocks:
            gone = self.ids[:, blocks:]
            self._last_is_ours = False
            self.blocks = blocks
            self.pool.release(gone)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``; shares pages, copies no data."""
        chosen, before = self.places[:, rows], self.ids
        self.pool.retain(chosen[0, :, : self.blocks])
        self._last_is_ours = False
        self.places = chosen
        self.pool.release(before)

    def fork(self) -> PageTable:
        """A second table over the same pages, copy on write."""
        twin = PageTable(self.pool, self.batch)
        twin.places = self.places.clone()
        twin._last_is_ours = self._last_is_ours = False
        self.pool.retain(self.ids)
        twin.blocks = self.blocks
        return twin

    def content(self, blocks: int) -> Pages:
        """The first ``blocks`` pages of every row, as views; valid until the next change."""
        ids = self.ids[:, :blocks]
        distinct, order = torch.unique(ids, return_inverse=True)
        pool = self.pool
        touch = (lambda places: pool.touch(distinct[places])) if pool.watched else None
        return Pages(order.view(ids.shape), tuple(pool.runs(distinct)), touch=touch)

    def load(self, pages: Pages) -> None:
        """Fill an empty table with saved pages: shared with a file if they are sealed, else copied."""
        pool, count = self.pool, pages.count
        ids = torch.arange(count, dtype=torch.int64, device="cpu")
        if pages.guards and pool.device.type == "cpu" and not pool.pinned:
            pool.seal(pages.slabs, pages.guards)
        else:
            for guard, slab in zip(pages.guards, pages.slabs):
                guard.touch(torch.arange(len(slab), dtype=torch.int64, device="cpu"))
            ids, first = pool.allocate(count), 0
            for slab in pages.slabs:
                pool.write(ids[first : first + len(slab)], slab)
                first += len(slab)
        chosen = ids[pages.order]
        pool.retain(chosen)
        self.places = torch.stack([chosen, pool.addresses(chosen)])
        self.blocks, self._last_is_ours = pages.order.shape[1], False
        if not pool.guards:
            pool.release(ids)

    def own_last(self) -> None:
        """Copy the last page of every row whose last page is shared."""
        if self._last_is_ours or not self.blocks:
            return
        last = self.ids[:, -1]
        shared = self.pool.shared(last)
        if shared.any():
            old = last[shared]
            new = self.pool.allocate(len(old))
            self.pool.copy_pages(old, new)
            # Id and address in one operation: with only one of them set, a write would hit the shared page.
            self.places[:, shared, self.blocks - 1] = torch.stack([new, self.pool.addresses(new)])
            self.pool.release(old)
        self._last_is_ours = True

    def release(self) -> None:
        """Release all pages."""
        if self.blocks:
            self.truncate(0)

    def __del__(self) -> None:
        if self.__dict__.get("blocks"):
            self.pool.abandon(self.places, self.blocks)
