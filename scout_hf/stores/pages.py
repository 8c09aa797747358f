"""Fixed-size pages in slabs that never move, shared by reference count."""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from scout_hf.errors import CacheStateError
from scout_hf.stores.host_memory import HostMemory
from scout_hf.stores.memory import allocate_slab
from scout_hf.stores.pinned import device_address, host_address_serves
from scout_hf.stores.region import Region
from scout_hf.stores.state import Guard, runs

MIN_SLAB_PAGES = 64


class PagePool:
    """Pages of one shape, allocated in slabs. The pool grows by adding slabs; slabs are never copied or resized.

    Thread-safe: caches forked from one prefix share a pool. An interrupted call can leak pages, but never frees a page
    twice or while it is referenced.

    Parameters
    ----------
    page_shape : tuple of int
        Shape of one page.
    dtype : torch.dtype
        Data type of the slabs.
    device : torch.device
        Device of the slabs.
    pinned : bool
        Pin the slabs, so that a GPU can read and write them directly.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.stores import PagePool
    >>> pool = PagePool((2, 4), torch.float32, torch.device("cpu"))
    >>> ids = pool.allocate(3)
    >>> pool.used_pages, pool.page_bytes
    (3, 32)
    >>> pool.release(ids)
    >>> pool.used_pages
    0
    """

    def __init__(self, page_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pinned: bool = False):
        self.page_shape, self.pinned = tuple(page_shape), pinned
        self.dtype, self.device = dtype, torch.device(device)
        # Slabs, first page id of each slab, total pages: one object, because they change together.
        self._layout: tuple[tuple[torch.Tensor, ...], tuple[int, ...], int] = ((), (), 0)
        self._fresh = self._sealed = 0
        # Of the first slabs, which can only be read.
        self.guards: tuple[Guard, ...] = ()
        self._memory: HostMemory | None = None
        self._regions: tuple[Region, ...] = ()
        self._free: list[int] = []
        self._references = torch.zeros(0, dtype=torch.int32, device="cpu")
        self._lock = threading.Lock()
        self._abandoned: deque[tuple[torch.Tensor, int]] = deque()

    @property
    def slabs(self) -> tuple[torch.Tensor, ...]:
        """The tensors that hold the pages, (pages, *page_shape) each."""
        return self._layout[0]

    @property
    def starts(self) -> tuple[int, ...]:
        """First page id of each slab."""
        return self._layout[1]

    @property
    def pages(self) -> int:
        """Capacity in pages, over all slabs."""
        return self._layout[2]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return math.prod(self.page_shape) * self.dtype.itemsize

    @property
    def used_pages(self) -> int:
        """Pages with at least one reference.

        Never deadlocks: a signal handler may ask for it while its own thread holds the pool's lock. The result may then
        still include pages of deleted tables.
        """
        # Check before acquiring, instead of a non-blocking acquire: an interrupt after that would never release it.
        if not self._lock.locked():
            with self._lock:
                self._reap()
        return self._fresh - len(self._free)

    def addresses(self, ids: torch.Tensor) -> torch.Tensor:
        """Memory addresses of these pages, int64 in the shape of ``ids``."""
        if len(self.slabs) == 1:
            return ids * self.page_bytes + self.slabs[0].data_ptr()
        starts = torch.tensor(self.starts, dtype=torch.int64, device="cpu")
        which = torch.bucketize(ids, starts, right=True) - 1
        places = torch.tensor([slab.data_ptr() for slab in self.slabs], dtype=torch.int64, device="cpu")
        return (ids - starts[which]) * self.page_bytes + places[which]

    def seen_by_device(self, addresses: torch.Tensor) -> torch.Tensor:
        """Where GPUs read the pages at these addresses of pinned host memory."""
        if not self.pinned or host_address_serves():
            return addresses
        seen = addresses.clone()
        for slab in self.slabs:
            first = slab.data_ptr()
            here = (addresses >= first) & (addresses < first + slab.nbytes)
            seen[here] += device_address(first) - first
        return seen

    def allocate(self, count: int) -> torch.Tensor:
        """Allocate pages with one reference each; their contents are undefined.

        Parameters
        ----------
        count : int
            Number of pages.

        Returns
        -------
        Tensor (count,) of int64, on the CPU
            Page ids: recycled pages if there are enough, else one ascending run within one slab.

        Raises
        ------
        HostMemoryError, PinnedMemoryError
            If a new slab cannot be allocated or pinned.
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

    def limit(self, memory: HostMemory) -> None:
        """Keep the pages in files and within a limit; for a pool without pages, on the CPU."""
        if self.pages:
            raise CacheStateError("a pool that has pages cannot be moved to files; use a new one")
        self._memory = memory

    @property
    def watched(self) -> bool:
        """Whether :meth:`touch` must be called before pages are read or written through their addresses."""
        return self._memory is not None or not self.checked

    @property
    def checked(self) -> bool:
        """Whether every page of a file has been checked."""
        return all(guard.complete for guard in self.guards)

    def touch(self, ids: torch.Tensor, tiles: torch.Tensor | None = None, read: bool = True) -> None:
        """Pages are about to be used: check those of a file, and note them as used.

        Parameters
        ----------
        ids : Tensor (n,) of int64
        tiles : Tensor (n,) of int64, or None
            Which KV head's tile of each; None for all.
        read : bool
            Whether they hold something that must be read.
        """
        self._hold(ids, tiles, read)
        for guard, start, slab in zip(self.guards, self.starts, self.slabs):
            if not guard.complete:
                here = (ids >= start) & (ids < start + len(slab))
                guard.touch(ids[here] - start, None if tiles is None else tiles[here])

    def _hold(self, ids: torch.Tensor, tiles: torch.Tensor | None, read: bool) -> None:
        """Bring pages into memory within its limit. Before they are checked: what is checked is what is read then."""
        memory = self._memory
        if memory is None or len(self._regions) != len(self.slabs):
            return
        of_page = self.page_shape[0]
        if tiles is None:
            numbers = torch.arange(of_page, dtype=torch.int64, device="cpu")
            ids, tiles = ids.repeat_interleave(of_page), numbers.repeat(len(ids))
        for region, slab, start in zip(self._regions, self.slabs, self.starts):
            here = (ids >= start) & (ids < start + len(slab))
            memory.touch(region, (ids[here] - start) * of_page + tiles[here], read)

    def seal(self, slabs: Sequence[torch.Tensor], guards: Sequence[Guard]) -> None:
        """Make slabs whose memory can only be read the first ones; a write to one of their pages goes to a copy.

        Each of its pages has a reference that is never dropped, so none is recycled.

        Raises
        ------
        CacheStateError
            If the pool has pages already.
        """
        with self._lock:
            if self.pages:
                raise CacheStateError("a pool that has pages cannot take those of a file; use a new one")
            *starts, count = itertools.accumulate(map(len, slabs), initial=0)
            self._references = torch.ones(count, dtype=torch.int32, device="cpu")
            self._layout = (tuple(slabs), tuple(starts), count)
            self._fresh = self._sealed = count
            self.guards = tuple(guards)
            if self._memory is not None:
                self._regions = tuple(guard.watched_by(self._memory) for guard in guards)

    def retain(self, ids: torch.Tensor) -> None:
        """Add one reference for every occurrence in ``ids``."""
        with self._lock:
            flat = ids.reshape(-1)
            self._references.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))

    def release(self, ids: torch.Tensor) -> None:
        """Drop one reference for every occurrence in ``ids``; pages without references are recycled."""
        with self._lock:
            self._drop(ids)

    def abandon(self, places: torch.Tensor, blocks: int) -> None:
        """``release`` a deleted table's pages at the next allocation.

        The garbage collector may call this inside any other call of the pool, so it neither takes the lock nor makes a
        view of ``places``.
        """
        self._abandoned.append((places, blocks))

    def shared(self, ids: torch.Tensor) -> torch.Tensor:
        """Which of these pages have more than one reference; bool in the shape of ``ids``."""
        with self._lock:
            return self._references[ids] > 1

    def write(self, ids: torch.Tensor, content: torch.Tensor) -> None:
        """Overwrite whole pages; ``content`` is (len(ids), *page_shape) with any strides."""
        if self.watched:
            self.touch(ids, read=False)
        for slab, here, local in self.by_slab(ids):
            slab[local] = content[here]

    def copy_pages(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy page ``sources[i]`` to page ``targets[i]``, also across slabs."""
        if self.watched:
            self.touch(sources)
        content = torch.empty((len(sources), *self.page_shape), dtype=self.dtype, device=self.device)
        for slab, here, local in self.by_slab(sources):
            content[here] = slab[local]
        self.write(targets, content)

    def by_slab(self, ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor | slice, torch.Tensor | slice]]:
        """Yield (slab, indices into ``ids``, indices into the slab) for every slab that ``ids`` (1-D) touches."""
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
        """Yield the pages ``ids`` (1-D) in order, as views (n, *page_shape) of runs that are contiguous in memory."""
        return runs(self.slabs, self.starts, ids)

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
        size = max(MIN_SLAB_PAGES, count + count // 8, (pages - self._sealed) // 2)
        shape, regions = (size, *self.page_shape), self._regions
        if self._memory is None:
            slab = allocate_slab(shape, self.dtype, self.device, self.pinned)
        else:
            slab, region = self._memory.slab(shape, self.dtype)
            regions = (*regions, region)
        references = torch.zeros(pages + size, dtype=torch.int32, device="cpu")
        references[:pages] = self._references[:pages]
        # Before the layout: counters of pages that do not exist yet do no harm.
        self._references, self._regions = references, regions
        self._layout = ((*slabs, slab), (*starts, pages), pages + size)

    def _recycle(self, ids: torch.Tensor) -> None:
        self._free.extend(ids.tolist())


def _as_run(ids: torch.Tensor) -> torch.Tensor | slice:
    """``ids`` as a slice if they ascend by one, so that indexing gives a view instead of a copy."""
    if ids.dim() == 1 and len(ids) > 1:
        first = int(ids[0])
        if int(ids[-1]) - first == len(ids) - 1 and bool((ids[1:] - ids[:-1] == 1).all()):
            return slice(first, first + len(ids))
    return ids
