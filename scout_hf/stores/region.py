"""The memory of a slab in a mapped file: what of it was used when, reading ahead, and giving it back."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys

import torch

PAGE = mmap.PAGESIZE
# The system maps so much around a place of a file that is touched, as far as it has it (Linux, fault_around_bytes).
WINDOW = 1 << 16
POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14: pages of a private mapping become copies of their own, content unchanged."""


class Region:
    """The memory of one slab in a mapped file, and when each unit of it was last used; held as long as the slab.

    Parameters
    ----------
    memory : mmap
    first : int
        Where the slab begins in it.
    slab : Tensor (pages, tiles, ...)
    private : bool
        Whether it is a private mapping, which nobody writes to: then the units are tiles, each copied into memory of
        its own, where the system can do that. Mapped from its page cache, a tile may bring 2 MiB with it.
    """

    def __init__(self, memory: mmap.mmap, first: int, slab: torch.Tensor, private: bool = False):
        pages, self.tiles = slab.shape[:2]
        self.memory, self.first, self.tile_bytes = memory, first, slab.nbytes // max(1, pages * self.tiles)
        if hasattr(mmap, "MADV_RANDOM"):
            # Else new files get large pages in the page cache, which are mapped whole at a touch.
            with contextlib.suppress(OSError):
                memory.madvise(mmap.MADV_RANDOM)
        self._copies = private and _copies(memory, slab.data_ptr() - first)
        if not self._copies:
            self.unit = WINDOW
        else:
            self.unit = PAGE if first % PAGE or self.tile_bytes % PAGE else self.tile_bytes
        self._origin = first if self.unit == self.tile_bytes else first // self.unit * self.unit
        # 0: not in memory, as far as we know.
        count = -(-(first + slab.nbytes - self._origin) // self.unit)
        self.used = torch.zeros(count, dtype=torch.int64, device="cpu")

    def units(self, tiles: torch.Tensor) -> torch.Tensor:
        """The units that tiles lie in, (n,) of int64, each once or more."""
        begins = tiles * self.tile_bytes + (self.first - self._origin)
        firsts, lasts = begins // self.unit, (begins + self.tile_bytes - 1) // self.unit
        if self.unit == self.tile_bytes:
            return firsts
        most = self.tile_bytes // self.unit + 2
        return torch.cat([torch.minimum(firsts + step, lasts) for step in range(most)])

    def bring(self, tiles: torch.Tensor) -> None:
        """Let the system read all of it at once, not piece by piece as it is touched."""
        tiles = tiles.unique()
        will_need(self.memory, tiles, self.tile_bytes, self.first)
        if self._copies:
            _advise(self.memory, POPULATE_WRITE, tiles, self.tile_bytes, self.first)

    def let_go(self, units: torch.Tensor) -> None:
        """Give memory back; the file keeps what it held."""
        self.used[units] = 0
        for begin, end in _runs(units, self.unit, self._origin):
            self.memory.madvise(mmap.MADV_DONTNEED, begin, min(end, len(self.memory)) - begin)


def will_need(memory: mmap.mmap, tiles: torch.Tensor, tile_bytes: int, first: int) -> None:
    """Let the system begin to read tiles, their numbers ascending, all at once; returns before they are there."""
    if hasattr(mmap, "MADV_WILLNEED"):
        _advise(memory, mmap.MADV_WILLNEED, tiles, tile_bytes, first)


def _advise(memory: mmap.mmap, advice: int, tiles: torch.Tensor, tile_bytes: int, first: int) -> None:
    for begin, end in _runs(tiles, tile_bytes, first):
        begin = begin // PAGE * PAGE
        with contextlib.suppress(OSError):
            memory.madvise(advice, begin, end - begin)


def _runs(numbers: torch.Tensor, size: int, first: int) -> list[tuple[int, int]]:
    """Pieces of ``size`` bytes, their numbers ascending, as runs of bytes: begin and end."""
    if not len(numbers):
        return []
    breaks = (numbers[1:] != numbers[:-1] + 1).nonzero().squeeze(1)
    begins = torch.cat([numbers[:1], numbers[breaks + 1]]) * size + first
    ends = (torch.cat([numbers[breaks], numbers[-1:]]) + 1) * size + first
    return list(zip(begins.tolist(), ends.tolist()))


def _copies(memory: mmap.mmap, begin: int) -> bool:
    """Let a private mapping that begins at this address have pages of its own; False where that cannot be done.

    Nothing is written: only a mapping that could be written to gets copies. Who reads a page that is no copy, such as
    one that was just given back, finds the same in the file.
    """
    if sys.platform != "linux":
        return False
    protect = getattr(ctypes.CDLL(None), "mprotect", None)
    size = ctypes.c_size_t(len(memory))
    if protect is None or protect(ctypes.c_void_p(begin), size, mmap.PROT_READ | mmap.PROT_WRITE):
        return False
    try:
        memory.madvise(POPULATE_WRITE, 0, PAGE)
    except OSError:
        protect(ctypes.c_void_p(begin), size, mmap.PROT_READ)
        return False
    return True
