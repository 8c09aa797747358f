"""A file of pages: safetensors whose data begins on a page of memory, so that it can be mapped."""

from __future__ import annotations

import math
import mmap
import os
import platform
import struct
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from scout_hf.errors import SessionError
from scout_hf.files import open_regular, parse_json
from scout_hf.sessions.mapped import Mapped, OpenFile
from scout_hf.sessions.writing import CHUNK_BYTES, DTYPES, bytes_of, dtype_name, header_of, write_all
from scout_hf.stores.state import Pages

ALIGNED = 4096
LARGEST_HEADER = 64 << 20
LINUX = sys.platform == "linux"
# Private, so that it may get pages of its own, and none of its size is reserved for that (see Region).
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0)
HOW: dict[str, Any] = (
    {"flags": mmap.MAP_PRIVATE | NORESERVE, "prot": mmap.PROT_READ} if LINUX else {"access": mmap.ACCESS_READ}
)
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Written:
    """What must be kept elsewhere to read the file again: its size, a hash of its header, and tile by tile of its data.

    sums : dict of Tensor (pages, tiles) of int64
        By name; a tile is one KV head's block.
    """

    size: int
    header: str
    sums: dict[str, torch.Tensor]


def write_pages(path: Path, parts: Mapping[str, Pages]) -> Written:
    """Write pages by name.

    Parameters
    ----------
    path : Path
        A file that is not there yet.
    parts : dict of Pages

    Returns
    -------
    Written

    Raises
    ------
    OSError
        If the disk is full or the file cannot be written.
    """
    entries: dict[str, Any] = {}
    at = 0
    for name, pages in parts.items():
        if pages.count:
            dtype, shape = pages.slabs[0].dtype, [pages.count, *pages.page_shape]
            end = at + dtype.itemsize * math.prod(shape)
            entries[name] = {"dtype": dtype_name(dtype), "shape": shape, "data_offsets": [at, end]}
            at = end
    header = header_of(entries, ALIGNED)
    sums = {}
    with path.open("xb", buffering=0) as file:
        write_all(file, memoryview(header))
        for name, pages in parts.items():
            if pages.count:
                sums[name] = _write_part(file, pages)
    return Written(len(header) + at, xxhash.xxh3_128_hexdigest(header), sums)


def _write_part(file: Any, pages: Pages) -> torch.Tensor:
    """Write the slabs of one part; the hash of each tile."""
    tiles = pages.page_shape[0]
    sums = np.empty(pages.count * tiles, dtype=np.uint64)
    done = number = 0
    for slab in pages.slabs:
        step = max(1, CHUNK_BYTES // max(1, slab[0].nbytes))
        for first in range(0, len(slab), step):
            # A copy on the host where the pages are on another device.
            chunk = slab[first : first + step].detach().cpu().contiguous()
            if pages.touch is not None:
                pages.touch(torch.arange(number, number + len(chunk), dtype=torch.int64, device="cpu"))
            number += len(chunk)
            view = bytes_of(chunk)
            count = len(chunk) * tiles
            size = len(view) // count
            hashed = (xxhash.xxh3_64_intdigest(view[place : place + size]) for place in range(0, len(view), size))
            sums[done : done + count] = np.fromiter(hashed, dtype=np.uint64, count=count)
            write_all(file, view)
            done += count
    return torch.from_numpy(sums.view(np.int64)).view(pages.count, tiles)


def map_pages(
    path: Path, size: int, header: str, sums: Mapping[str, torch.Tensor]
) -> tuple[OpenFile, dict[str, Mapped]]:
    """Map a file that :func:`write_pages` wrote; nothing is read but the header.

    Parameters
    ----------
    path : Path
    size : int
        Bytes of the file.
    header : str
        Hash of the header.
    sums : dict of Tensor (pages, tiles) of int64
        Hashes of the tiles.

    Returns
    -------
    OpenFile
    dict of Mapped
        By name.

    Raises
    ------
    SessionError
        If the file is missing or cannot be read, is shorter or longer, or has another header.
    """
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise SessionError(f"{path} has {found} bytes, and {size} were written: it is damaged")
            memory = mmap.mmap(file.fileno(), size, **HOW)
            opened = OpenFile(file.fileno(), str(path))
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise SessionError(f"{path} cannot be mapped: {error}") from error
    try:
        return opened, _mapped(path, memory, header, sums)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, SessionError):
            raise
        raise SessionError(f"{path} is damaged: its header cannot be used ({error!r})") from error


def _mapped(path: Path, memory: mmap.mmap, header: str, sums: Mapping[str, torch.Tensor]) -> dict[str, Mapped]:
    entries, first = _header(path, memory, header)
    everything = _as_tensor(memory)
    made = {}
    for name, entry in entries.items():
        dtype, shape, (start, end) = _BY_NAME[entry["dtype"]], entry["shape"], entry["data_offsets"]
        slab = everything[first + start : first + end].view(dtype).view(shape)
        known = sums.get(name)
        if known is None or known.dtype != torch.int64 or tuple(known.shape) != tuple(shape[:2]):
            raise SessionError(f"{path} has no checksums for {name}: it is damaged")
        made[name] = Mapped(slab, known, memory, first + start, f"{name} of {path}")
    return made


def _header(path: Path, memory: mmap.mmap, known: str) -> tuple[dict[str, Any], int]:
    """Entries, and where the data begins."""
    length = struct.unpack("<Q", memory[:8])[0] if len(memory) >= 8 else LARGEST_HEADER + 1
    first = 8 + length
    if length > LARGEST_HEADER or first > len(memory) or xxhash.xxh3_128_hexdigest(memory[:first]) != known:
        raise SessionError(f"{path} is damaged: its header is not the one that was written")
    entries = parse_json(memory[8:first])
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        bytes_needed = _BY_NAME[entry["dtype"]].itemsize * math.prod(entry["shape"])
        if len(entry["shape"]) < 2 or not 0 <= start <= end <= len(memory) - first or end - start != bytes_needed:
            raise SessionError(f"{path} is damaged: {name} does not lie within it")
    return entries, first


def _as_tensor(memory: mmap.mmap) -> torch.Tensor:
    with warnings.catch_warnings():
        # Torch warns that the memory must not be written to, which pages of a file never are.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.frombuffer(memory, dtype=np.uint8))
