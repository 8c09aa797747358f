"""Pages of a file: read when they are wanted, and each tile checked when it is first read."""

from __future__ import annotations

import mmap
import os
import threading
from typing import Any

import numpy as np
import torch
import xxhash

from scout_hf.errors import SessionError
from scout_hf.stores.host_memory import HostMemory
from scout_hf.stores.region import Region, will_need


class OpenFile:
    """A file that is mapped, and whether it is still what it was; closed when nothing refers to it any more.

    A file that is replaced or removed does no harm: its pages stay until they are let go. One that is written to or cut
    short in place does.

    Parameters
    ----------
    number : int
        A file descriptor, which is duplicated.
    path : str
        For error messages.
    """

    def __init__(self, number: int, path: str):
        self.path, self._number = path, os.dup(number)
        self._was = self._look()

    def _look(self) -> tuple[int, int]:
        now = os.fstat(self._number)
        return now.st_size, now.st_mtime_ns

    def check(self) -> None:
        """Raise SessionError if the file was changed since it was opened."""
        if self._look() != self._was:
            raise SessionError(
                f"{self.path} was changed while it was open, and caches of it cannot be used any more: load the "
                "session again, or read the text again"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenFile:
        return self

    def __del__(self) -> None:
        if "_number" in self.__dict__:
            os.close(self._number)


class Mapped:
    """The pages of one layer in a mapped file. A page holds one tile of each KV head: its block.

    Thread-safe.

    Parameters
    ----------
    slab : Tensor (pages, tiles, ...)
        The memory of the file; it cannot be written to.
    sums : Tensor (pages, tiles) of int64
        The hash of each tile.
    memory : mmap
    first : int
        Where the slab begins in it.
    what : str
        For error messages.

    Attributes
    ----------
    complete : bool
        Whether every tile has been checked.
    """

    def __init__(self, slab: torch.Tensor, sums: torch.Tensor, memory: mmap.mmap, first: int, what: str):
        self.slab, self.what = slab, what
        self._memory, self._first = memory, first
        self._sums = sums.contiguous().numpy().view(np.uint64).reshape(-1)
        self.pages, self.tiles = sums.shape
        self.tile_bytes = slab[0, 0].nbytes if self.pages else 0
        self._checked = torch.zeros(self.pages * self.tiles, dtype=torch.bool, device="cpu")
        self._left = self.pages * self.tiles
        self._lock = threading.Lock()
        self._announces = True

    @property
    def complete(self) -> bool:
        return not self._left

    def watched_by(self, memory: HostMemory) -> Region:
        """Let a limit on memory count these pages too."""
        self._announces = False
        return memory.watch(self._memory, self._first, self.slab, private=True)

    def touch(self, pages: torch.Tensor, tiles: torch.Tensor | None = None) -> None:
        """Check tiles that are about to be read, those that have not been.

        Parameters
        ----------
        pages : Tensor of int64
            Page ids; those that are not of this file are ignored.
        tiles : Tensor of int64, of the same shape, or None
            Which tile of each page; None for all.

        Raises
        ------
        SessionError
            If a tile is not what was written.
        """
        if not self._left:
            return
        of_file = pages < self.pages
        if tiles is None:
            every = torch.arange(self.tiles, dtype=torch.int64, device=pages.device)
            wanted = (pages[of_file][:, None] * self.tiles + every).flatten()
        else:
            wanted = pages[of_file] * self.tiles + tiles[of_file]
        wanted = wanted[~self._checked[wanted]]
        if len(wanted):
            with self._lock:
                self._check(wanted.unique())

    def _check(self, wanted: torch.Tensor) -> None:
        if self._announces:
            will_need(self._memory, wanted, self.tile_bytes, self._first)
        size, view = self.tile_bytes, memoryview(self._memory)
        begins, known = (wanted * size + self._first).tolist(), self._sums[wanted.numpy()].tolist()
        for at, number in zip(begins, known):
            if xxhash.xxh3_64_intdigest(view[at : at + size]) != number:
                page, tile = divmod((at - self._first) // size, self.tiles)
                raise SessionError(
                    f"{self.what} is damaged: block {page} of KV head {tile} is not what was written; remove "
                    "the session and read the text again"
                )
        fresh = int((~self._checked[wanted]).sum())
        self._checked[wanted] = True
        self._left -= fresh
