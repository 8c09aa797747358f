"""Read bandwidth of memory, the limit of attention on a CPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from ctypes import byref
from typing import Any

import torch

from scout_hf.errors import ConfigError
from scout_hf.kernels.cpu import BlockLists, PagedStore
from scout_hf.kernels.cpu.library import AttendArgs, load_library


class MemoryReader:
    """Reads memory with the native library: loads all of it and adds it up, nothing else.

    Parameters
    ----------
    threads : int
        1: the calling thread. More take some ten microseconds to wake.

    Raises
    ------
    ConfigError
        Without the native library.

    Examples
    --------
    >>> reader = MemoryReader(threads=1)
    >>> reader.span(torch.zeros(1 << 20))
    >>> reader.close()
    """

    def __init__(self, threads: int):
        library = load_library()
        if library is None:
            raise ConfigError("MemoryReader needs the native library; reinstall scout_hf with g++ or clang at hand")
        self._library, self._threads = library, threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def span(self, tensor: torch.Tensor) -> None:
        """Read a contiguous CPU tensor from start to end."""
        start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        share = -(-size // self._threads // 4096) * 4096
        parts = [(start + at, min(share, size - at), 1) for at in range(0, size, share)]
        self._all(self._library.read_span, parts)

    def tiles(self, store: PagedStore, lists: BlockLists) -> None:
        """Read the tiles of a PagedKV that attention over block lists would read.

        Parameters
        ----------
        store : PagedKV
            On the CPU.
        lists : BlockLists
            ``ids`` is contiguous int32; without counts.
        """
        count = lists.ids.shape[2]
        share = -(-count // self._threads)
        parts = []
        for first in range(0, count, share):
            args = AttendArgs(store=store.native(), query_heads=store.heads, blocks_stride=count)
            args.blocks = lists.ids.data_ptr() + first * lists.ids.element_size()
            args.count = min(share, count - first)
            parts.append((byref(args), 1))
        self._all(self._library.read_tiles, parts)

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()

    def _all(self, read: Any, parts: list[tuple[Any, ...]]) -> None:
        if self._pool is None:
            for part in parts:
                read(*part)
        else:
            for job in [self._pool.submit(read, *part) for part in parts]:
                job.result()
