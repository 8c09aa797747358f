"""A local disk by plain calls of the system: what saving and opening a session can reach at best."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

CHUNK_BYTES = 8 << 20


def about(folder: Path) -> dict[str, Any]:
    """Device and file system of a folder, for the record."""
    here = os.path.realpath(folder)
    found = [one for one in psutil.disk_partitions(all=True) if Path(here).is_relative_to(one.mountpoint)]
    part = max(found, key=lambda one: len(one.mountpoint), default=None)
    named = {} if part is None else {"device": part.device, "filesystem": part.fstype}
    return named | {"free_bytes": psutil.disk_usage(here).free}


def check_room(folder: Path, need: int) -> None:
    """ValueError if the disk has less room than that."""
    free = psutil.disk_usage(str(folder)).free
    if need > free:
        raise ValueError(
            f"this needs {need / 2**30:.1f} GiB in {folder}, and {free / 2**30:.1f} are free; take another --folder, "
            "or fewer tokens"
        )


def write(path: Path, size: int, filler: bytes) -> None:
    """Write so many bytes to a new file, up to the disk."""
    with path.open("xb", buffering=0) as file:
        left, view = size, memoryview(filler)
        while left:
            left -= file.write(view[:left])
        os.fsync(file.fileno())


def read(paths: Iterable[Path]) -> int:
    """Read files from beginning to end; how many bytes that were."""
    buffer, total = bytearray(CHUNK_BYTES), 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total


def read_scattered(path: Path, size: int, count: int, announced: bool, seed: int = 0) -> None:
    """Read ``count`` pieces of ``size`` bytes at random places, ``announced`` to the system before or not."""
    pieces = path.stat().st_size // size
    places = [size * place for place in random.Random(seed).sample(range(pieces), min(count, pieces))]
    number = os.open(path, os.O_RDONLY)
    try:
        # Else the system reads much around each place.
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)
        for place in places if announced else ():
            os.posix_fadvise(number, place, size, os.POSIX_FADV_WILLNEED)
        for place in places:
            os.pread(number, size, place)
    finally:
        os.close(number)


def drop(paths: Iterable[Path]) -> None:
    """Let the system forget what it has of these files in its page cache, mapped pages excepted."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes() -> int:
    """Bytes that disks read for this process so far; 0 where the system does not say."""
    counters = getattr(psutil.Process(), "io_counters", None)
    return 0 if counters is None else counters().read_bytes


def mapped_bytes(folder: Path) -> int:
    """Bytes of this process' memory that belong to files in a folder; 0 where the system does not say."""
    maps = getattr(psutil.Process(), "memory_maps", None)
    home = os.path.realpath(folder) + os.sep
    return 0 if maps is None else sum(one.rss for one in maps(grouped=True) if one.path.startswith(home))
