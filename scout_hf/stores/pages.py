"""Fixed-size pages in slabs that never move, and tables of pages that share them by reference count."""

from __future__ import annotations

import bisect
import math
import threading
from collections import deque
from collections.abc import Iterator

import torch

from scout_hf.stores.memory import allocate_slab

MIN_SLAB_PAGES = 64


class PagePool:
    """Pages of one shape, in slabs. A slab is never copied or resized; the pool grows by adding one.

    Parameters
    ----------
    page_shape : tuple of int
        Shape of one page.
    dtype, device
        Of the slabs.
    pinned : bool
        Whether a GPU reads and writes the slabs by itself.

    Safe to use from several threads: caches forked from one prefix share a pool. An error at any point costs some pages
    at worst: none is ever given back twice, or while somebody holds it.
    """

    def __init__(self, page_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pinned: bool = False):
        self.page_shape, self.pinned = tuple(page_shape), pinned
        self.dtype, self.device = dtype, torch.device(device)
        # Slabs, the number of each one's first page, and pages in all: one object, for they change together.
        self._layout: tuple[tuple[torch.Tensor, ...], tuple[int, ...], int] = ((), (), 0)
        self._fresh = 0
        self._free: list[int] = []
        self._references = torch.zeros(0, dtype=torch.int32, device="cpu")
        self._lock = threading.Lock()
        self._abandoned: deque[tuple[torch.Tensor, int]] = deque()

    @property
    def slabs(self) -> tuple[torch.Tensor, ...]:
        """Where the pages are."""
        return self._layout[0]

    @property
    def starts(self) -> tuple[int, ...]:
        """The number of each slab's first page."""
        return self._layout[1]

    @property
    def pages(self) -> int:
        """Pages of all slabs, used or not."""
        return self._layout[2]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return math.prod(self.page_shape) * self.dtype.itemsize

    @property
    def used_pages(self) -> int:
        """Pages that some table holds.

        Never waits for the calling thread itself: a signal handler may ask for statistics while its own thread is
        changing the pool. Then pages of tables that are gone may count still.
        """
        # By asking first, not by trying to take it: an interrupt right behind that would leave it taken for good.
        if not self._lock.locked():
            with self._lock:
                self._reap()
        return self._fresh - len(self._free)

    def addresses(self, ids: torch.Tensor) -> torch.Tensor:
        """Where these pages are in memory: int64, in the shape of ``ids``."""
        if len(self.slabs) == 1:
            return ids * self.page_bytes + self.slabs[0].data_ptr()
        starts = torch.tensor(self.starts, dtype=torch.int64, device="cpu")
        which = torch.bucketize(ids, starts, right=True) - 1
        places = torch.tensor([slab.data_ptr() for slab in self.slabs], dtype=torch.int64, device="cpu")
        return (ids - starts[which]) * self.page_bytes + places[which]

    def allocate(self, count: int) -> torch.Tensor:
        """``count`` page ids with one reference each, int64 on the CPU; contents are undefined.

        Recycled pages come first where they suffice; otherwise the ids are one ascending run in one slab.
        """
        with self._lock:
            self._reap()
            if 0 < count <= len(self._free):
                ids = torch.tensor(self._free[-count:], dtype=torch.int64, device="cpu")
                del self._free[-count:]
            else:
                ids = self._run(count)
            self._references[ids] = 1
            return ids

    def retain(self, ids: torch.Tensor) -> None:
        """Add one reference for every occurrence in ``ids``."""
        with self._lock:
            flat = ids.reshape(-1)
            self._references.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))

    def release(self, ids: torch.Tensor) -> None:
        """Drop one reference for every occurrence in ``ids``; pages without any are recycled."""
        with self._lock:
            self._drop(ids)

    def abandon(self, places: torch.Tensor, blocks: int) -> None:
        """``release`` a table's pages at the next allocation: it may be collected inside any other call, even that one.

        ``places`` is cut later: during a collection no view of it may be made.
        """
        self._abandoned.append((places, blocks))

    def shared(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of these pages have more than one reference."""
        with self._lock:
            return self._references[ids] > 1

    def write(self, ids: torch.Tensor, content: torch.Tensor) -> None:
        """Fill whole pages: ``content`` is (len(ids), *page_shape), any strides."""
        for slab, here, local in self.by_slab(ids):
            slab[local] = content[here]

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy pages one to one, also across slabs."""
        content = torch.empty((len(sources), *self.page_shape), dtype=self.dtype, device=self.device)
        for slab, here, local in self.by_slab(sources):
            content[here] = slab[local]
        self.write(targets, content)

    def by_slab(self, ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor | slice, torch.Tensor | slice]]:
        """Yield (slab, where in ``ids``, ids within the slab) for every slab that ``ids`` (1-D) touches."""
        if len(self.slabs) == 1:
            yield self.slabs[0], slice(None), _as_run(ids)
            return
        for slab, start in zip(self.slabs, self.starts):
            here = ((ids >= start) & (ids < start + len(slab))).nonzero().squeeze(1)
            if len(here) == len(ids):
                yield slab, slice(None), _as_run(ids - start)
                return
            if len(here):
                yield slab, here, ids[here] - start

    def runs(self, ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield views of (n, *page_shape) that are these pages (1-D) in order, as long as memory allows."""
        numbers = ids.tolist()
        begin = 0
        for end in range(1, len(numbers) + 1):
            if end < len(numbers) and numbers[end] == numbers[end - 1] + 1 and numbers[end] not in self.starts:
                continue
            which = bisect.bisect_right(self.starts, numbers[begin]) - 1
            first = numbers[begin] - self.starts[which]
            yield self.slabs[which][first : first + end - begin]
            begin = end

    def _reap(self) -> None:
        while self._abandoned:
            places, blocks = self._abandoned.popleft()
            self._drop(places[0, :, :blocks])

    def _drop(self, ids: torch.Tensor) -> None:
        flat = ids.reshape(-1)
        self._references.index_add_(0, flat, -torch.ones_like(flat, dtype=torch.int32))
        self._recycle(flat[self._references[flat] == 0].unique())

    def _run(self, count: int) -> torch.Tensor:
        if self._fresh + count > self.pages:
            rest = range(self._fresh, self.pages)
            self._add_slab(count)
            self._fresh = rest.stop
            self._free.extend(rest)
        ids = torch.arange(self._fresh, self._fresh + count, dtype=torch.int64, device="cpu")
        self._fresh += count
        return ids

    def _add_slab(self, count: int) -> None:
        slabs, starts, pages = self._layout
        size = max(MIN_SLAB_PAGES, count + count // 8, pages // 2)
        slab = allocate_slab((size, *self.page_shape), self.dtype, self.device, self.pinned)
        references = torch.zeros(pages + size, dtype=torch.int32, device="cpu")
        references[:pages] = self._references[:pages]
        # Counters of pages that are not there do no harm.
        self._references = references
        self._layout = ((*slabs, slab), (*starts, pages), pages + size)

    def _recycle(self, ids: torch.Tensor) -> None:
        self._free.extend(ids.tolist())


def _as_run(ids: torch.Tensor) -> torch.Tensor | slice:
    """``ids`` as a slice where they ascend by one, so that indexing gives a view instead of a copy."""
    if ids.dim() == 1 and len(ids) > 1:
        first = int(ids[0])
        if int(ids[-1]) - first == len(ids) - 1 and bool((ids[1:] - ids[:-1] == 1).all()):
            return slice(first, first + len(ids))
    return ids


class PageTable:
    """The pages of each row of a batch, in order.

    Rows and tables may share pages; every holder counts. Whoever writes to the last page of a row asks
    ``own_last`` first.

    Attributes
    ----------
    ids : Tensor (batch, blocks) of int64 on the CPU
        Page numbers.
    addresses : Tensor (batch, blocks) of int64 on the CPU
        Where the pages are in memory.
    places : Tensor (2, batch, capacity) of int64 on the CPU
        Both, with spare capacity; another tensor whenever one that a reader may hold would have to change its shape.
    """

    def __init__(self, pool: PagePool, batch: int):
        self.pool = pool
        self.places = torch.empty((2, batch, 0), dtype=torch.int64, device="cpu")
        self.blocks = 0
        self._last_is_ours = True

    @property
    def ids(self) -> torch.Tensor:
        return self.places[0, :, : self.blocks]

    @property
    def addresses(self) -> torch.Tensor:
        return self.places[1, :, : self.blocks]

    @property
    def batch(self) -> int:
        """Rows."""
        return self.places.shape[1]

    def extend(self, blocks: int) -> torch.Tensor:
        """Append ``blocks`` fresh pages to every row and return them, (batch, blocks)."""
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
        """Make row ``i`` what row ``rows[i]`` was; moves page numbers, not data."""
        chosen, before = self.places[:, rows], self.ids
        self.pool.retain(chosen[0, :, : self.blocks])
        self._last_is_ours = False
        self.places = chosen
        self.pool.release(before)

    def fork(self) -> PageTable:
        """A second table over the same pages; either copies a page before writing to it."""
        twin = PageTable(self.pool, self.batch)
        twin.places = self.places.clone()
        twin._last_is_ours = self._last_is_ours = False
        self.pool.retain(self.ids)
        twin.blocks = self.blocks
        return twin

    def own_last(self) -> None:
        """Give every row a last page of its own, copying the shared ones."""
        if self._last_is_ours or not self.blocks:
            return
        last = self.ids[:, -1]
        shared = self.pool.shared(last)
        if shared.any():
            old = last[shared]
            new = self.pool.allocate(len(old))
            self.pool.copy_pages(old, new)
            # Number and address by one operation: a page of others must not be written to under the number of ours.
            self.places[:, shared, self.blocks - 1] = torch.stack([new, self.pool.addresses(new)])
            self.pool.release(old)
        self._last_is_ours = True

    def release(self) -> None:
        """Give all pages back."""
        if self.blocks:
            self.truncate(0)

    def __del__(self) -> None:
        if self.__dict__.get("blocks"):
            self.pool.abandon(self.places, self.blocks)
