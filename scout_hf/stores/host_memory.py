"""A limit on the host memory of a cache: pages lie in files, and what was not used for longest leaves memory first."""

from __future__ import annotations

import contextlib
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

PAGE = mmap.PAGESIZE
# The system maps so much around a place of a file that is touched, as far as it has it (Linux, fault_around_bytes).
WINDOW = 1 << 16
# Below the limit by so much after tiles have left, so that this is rare.
LEFT_OVER = 0.9


class Region:
    """The memory of one slab in a mapped file, and when each window of it was last used; held as long as the slab.

    Parameters
    ----------
    memory : mmap
    first : int
        Where the slab begins in it.
    slab : Tensor (pages, tiles, ...)
    """

    def __init__(self, memory: mmap.mmap, first: int, slab: torch.Tensor):
        pages, self.tiles = slab.shape[:2]
        self.memory, self.first, self.tile_bytes = memory, first, slab.nbytes // max(1, pages * self.tiles)
        self._base = first // WINDOW
        # 0: not in memory, as far as we know.
        self.used = torch.zeros((first + slab.nbytes - 1) // WINDOW - self._base + 1, dtype=torch.int64, device="cpu")

    def windows(self, tiles: torch.Tensor) -> torch.Tensor:
        """The windows that tiles lie in, (n,) of int64, each once or more."""
        begins = tiles * self.tile_bytes + self.first
        firsts, lasts = begins // WINDOW, (begins + self.tile_bytes - 1) // WINDOW
        most = self.tile_bytes // WINDOW + 2
        return torch.cat([torch.minimum(firsts + step, lasts) for step in range(most)]) - self._base

    def read_ahead(self, tiles: torch.Tensor) -> None:
        """Let the system read all of it at once, not piece by piece as it is touched."""
        if hasattr(mmap, "MADV_WILLNEED"):
            for begin, end in _runs(tiles.unique(), self.tile_bytes, self.first):
                begin = begin // PAGE * PAGE
                with contextlib.suppress(OSError):
                    self.memory.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def let_go(self, windows: torch.Tensor) -> None:
        """Give memory back; the file keeps what it held."""
        self.used[windows] = 0
        for begin, end in _runs(windows, WINDOW, self._base * WINDOW):
            self.memory.madvise(mmap.MADV_DONTNEED, begin, min(end, len(self.memory)) - begin)


def _runs(numbers: torch.Tensor, size: int, first: int) -> list[tuple[int, int]]:
    """Pieces of ``size`` bytes, their numbers ascending, as runs of bytes: begin and end."""
    if not len(numbers):
        return []
    breaks = (numbers[1:] != numbers[:-1] + 1).nonzero().squeeze(1)
    begins = torch.cat([numbers[:1], numbers[breaks + 1]]) * size + first
    ends = (torch.cat([numbers[breaks], numbers[-1:]]) + 1) * size + first
    return list(zip(begins.tolist(), ends.tolist()))


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
                f"no room for {size / 2**30:.3g} GiB of pages in {self.folder or tempfile.gettempdir()} ({error}): "
                "free some, set spill_dir to a folder on another disk, or leave host_memory out to keep KV in memory"
            ) from error
        slab = torch.frombuffer(memory, dtype=torch.uint8)[:size].view(dtype).view(shape)
        return slab, self.watch(memory, 0, slab)

    def watch(self, memory: mmap.mmap, first: int, slab: torch.Tensor) -> Region:
        """Keep a mapped slab (pages, tiles, ...) within the limit too."""
        region = Region(memory, first, slab)
        self._regions.add(region)
        return region

    def touch(self, region: Region, wanted: torch.Tensor, read: bool) -> None:
        """Tiles of a region, (n,) of int64, are about to be used; ``read``: they hold something that must be read."""
        if not len(wanted):
            return
        with self._lock:
            self._clock += 1
            windows = region.windows(wanted)
            away = region.used[windows] == 0
            if bool(away.any()):
                self._held += len(windows[away].unique()) * WINDOW
                if read:
                    tiles = wanted[away.view(-1, len(wanted)).any(0)]
                    self.wanted_bytes += len(tiles) * region.tile_bytes
                    region.read_ahead(tiles)
            region.used[windows] = self._clock
            if self._held > self.limit:
                self._shrink()

    def _shrink(self) -> None:
        """Let go of the windows that were not used for longest, but of none that is just being used."""
        regions = list(self._regions)
        used = torch.cat([region.used for region in regions])
        here = (used > 0).nonzero().squeeze(1)
        self._held = len(here) * WINDOW
        most = (self._held - int(self.limit * LEFT_OVER)) // WINDOW
        leaving = here[used[here].argsort(stable=True)[:most]]
        leaving = leaving[used[leaving] < self._clock].sort().values
        starts = [0, *itertools.accumulate(len(region.used) for region in regions)]
        for region, start, end in zip(regions, starts, starts[1:]):
            region.let_go(leaving[(leaving >= start) & (leaving < end)] - start)
        self._held -= len(leaving) * WINDOW
        self.evicted_bytes += len(leaving) * WINDOW

    def __deepcopy__(self, memo: dict[int, Any]) -> HostMemory:
        return self
