"""A limit on the host memory of a cache: pages lie in files, and what was not used for longest leaves memory first."""

from __future__ import annotations

import itertools
import math
import mmap
import os
import tempfile
import threading
import weakref
from typing import Any

import torch

from scout_hf.errors import HostMemoryError
from scout_hf.sizes import in_words
from scout_hf.stores.region import Region

# Below the limit by so much after tiles have left, so that this is rare.
LEFT_OVER = 0.9


class HostMemory:
    """Keeps the pages of a cache and its forks in files, and within a limit of memory. Thread-safe.

    The pages of a running cache lie in files without a name, which the system removes with the process. Memory is given
    back by unmapping: the system writes what is new to the disk when it wants, and reads it again when it is touched.
    Nothing that is in use is disturbed, only slower.

    Parameters
    ----------
    limit : int
        Bytes of pages that stay in memory.
    folder : str or None
        Where the files are; on a local disk. None for the system's folder for temporary files.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.stores.host_memory import HostMemory
    >>> memory = HostMemory(1 << 20)
    >>> slab, region = memory.slab((64, 2, 4096), torch.float32)
    >>> slab.shape
    torch.Size([64, 2, 4096])
    """

    def __init__(self, limit: int, folder: str | None = None):
        self.limit, self.folder = limit, folder
        self.evicted_bytes = self.wanted_bytes = 0
        self._regions: weakref.WeakSet[Region] = weakref.WeakSet()
        self._clock = self._held = 0
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of pages that are in memory, as far as was seen."""
        return self._held

    def slab(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, Region]:
        """A slab of undefined content in a file, (pages, tiles, ...), and its region.

        Raises
        ------
        HostMemoryError
            If the disk has no room for it.
        """
        size = dtype.itemsize * math.prod(shape)
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                # Without it, a full disk would end the process when a page is written.
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
                memory = mmap.mmap(file.fileno(), max(size, 1))
        except OSError as error:
            raise HostMemoryError(
                f"no room for {in_words(size)} of pages in {self.folder or tempfile.gettempdir()} ({error}): "
                "free some, set spill_dir to a folder on another disk, or leave host_memory out to keep KV in memory"
            ) from error
        slab = torch.frombuffer(memory, dtype=torch.uint8)[:size].view(dtype).view(shape)
        return slab, self.watch(memory, 0, slab)

    def watch(self, memory: mmap.mmap, first: int, slab: torch.Tensor, private: bool = False) -> Region:
        """Keep a mapped slab (pages, tiles, ...) within the limit too; ``private`` as in :class:`Region`."""
        region = Region(memory, first, slab, private)
        self._regions.add(region)
        return region

    def touch(self, region: Region, wanted: torch.Tensor, read: bool) -> None:
        """Tiles of a region, (n,) of int64, are about to be used; ``read``: they hold something that must be read."""
        if not len(wanted):
            return
        with self._lock:
            self._clock += 1
            units = region.units(wanted)
            away = region.used[units] == 0
            if bool(away.any()):
                self._held += len(units[away].unique()) * region.unit
                if read:
                    tiles = wanted[away.view(-1, len(wanted)).any(0)]
                    self.wanted_bytes += len(tiles) * region.tile_bytes
                    region.bring(tiles)
            region.used[units] = self._clock
            if self._held > self.limit:
                self._shrink()

    def _shrink(self) -> None:
        """Let go of what was not used for longest, but of nothing that is just being used."""
        regions = list(self._regions)
        used = torch.cat([region.used for region in regions])
        starts = list(itertools.accumulate((len(region.used) for region in regions), initial=0))
        bounds = torch.tensor(starts, dtype=torch.int64, device="cpu")
        units = torch.tensor([region.unit for region in regions], dtype=torch.int64, device="cpu")
        here = used.nonzero().squeeze(1)
        when, sizes = used[here], units[torch.bucketize(here, bounds, right=True) - 1]
        self._held = int(sizes.sum())
        share = max(0.0, 1 - self.limit * LEFT_OVER / max(1, self._held))
        oldest = when.kthvalue(max(1, math.ceil(share * len(here)))).values
        leaves = (when <= oldest) & (when < self._clock)
        leaving, gone = here[leaves], int(sizes[leaves].sum())
        ends = torch.searchsorted(leaving, bounds).tolist()
        for region, start, first, last in zip(regions, starts, ends, ends[1:]):
            region.let_go(leaving[first:last] - start)
        self._held -= gone
        self.evicted_bytes += gone

    def __deepcopy__(self, memo: dict[int, Any]) -> HostMemory:
        return self
