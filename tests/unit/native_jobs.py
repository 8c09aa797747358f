"""Jobs of a native pool that copy words, for its tests and for processes that these start."""

from __future__ import annotations

import ctypes

from scout_hf.kernels.cpu.pool import CopyArgs, quick


class Words:
    """64-bit words at fixed addresses, and the jobs that copy one to the next."""

    def __init__(self, *values):
        self.array = (ctypes.c_uint64 * len(values))(*values)

    def at(self, index):
        return ctypes.addressof(self.array) + 8 * index

    def __getitem__(self, index):
        return self.array[index]

    def __setitem__(self, index, value):
        self.array[index] = value


def copy_job(pool, sources, targets, size=8, **options):
    """Submit copies between lists of addresses; the ticket."""
    lists = [(ctypes.c_int64 * len(each))(*each) for each in (sources, targets)]
    args = CopyArgs(*map(ctypes.addressof, lists), len(sources), size)
    keep = (lists, options.pop("keep", ()))
    return pool.submit(quick(pool.library, "scout_submit_copy"), args, keep=keep, **options)


def move(pool, words, source, target, **options):
    return copy_job(pool, [words.at(source)], [words.at(target)], keep=words, **options)
