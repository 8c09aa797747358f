"""Writing safetensors piece by piece, without a second copy in memory, and with the disk at work from the beginning."""

from __future__ import annotations

import ctypes
import json
import struct
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from scout_hf.errors import SavingError

CHUNK_BYTES = 32 << 20
DTYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.uint8: "U8",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
WORTH_BEGINNING = 1 << 20
_BEGIN = 2  # SYNC_FILE_RANGE_WRITE of Linux


def dtype_name(dtype: torch.dtype) -> str:
    """Its name in safetensors; SavingError if it has none."""
    if dtype not in DTYPES:
        raise SavingError(f"a tensor of {dtype} cannot be saved; {', '.join(sorted(DTYPES.values()))} can")
    return DTYPES[dtype]


def header_of(entries: Mapping[str, Any], multiple: int) -> bytes:
    """The beginning of a safetensors file, padded to a multiple of so many bytes."""
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % multiple)
    return struct.pack("<Q", len(text)) + text


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """Write tensors by name; size and hash of the file.

    Raises
    ------
    SavingError
        If safetensors has no name for a dtype.
    OSError
        If the disk is full or the file cannot be written.
    """
    # The largest items first: all are aligned then.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    entries, at = {}, 0
    for name in names:
        tensor, end = tensors[name], at + tensors[name].nbytes
        entries[name] = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    header = header_of(entries, 8)
    seen = xxhash.xxh3_128(header)
    with path.open("xb", buffering=0) as file:
        write_all(file, memoryview(header))
        for name in names:
            whole = bytes_of(tensors[name].detach().cpu().contiguous())
            for first in range(0, len(whole), CHUNK_BYTES):
                seen.update(piece := whole[first : first + CHUNK_BYTES])
                write_all(file, piece)
    return len(header) + at, seen.hexdigest()


def write_all(file: Any, view: memoryview) -> None:
    """Write all of it, and have the disk begin with that."""
    at, size = file.tell(), len(view)
    while len(view):
        view = view[file.write(view) :]
    if size >= WORTH_BEGINNING and (begin := _beginning()) is not None:
        # Only speed depends on it: else the disk waits until the file is complete.
        begin(file.fileno(), ctypes.c_int64(at), ctypes.c_int64(size), _BEGIN)


def _beginning() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
