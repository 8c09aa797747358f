"""Detect a truncated shared object: the loader would accept it, and its first use would crash the process."""

from __future__ import annotations

import struct
from pathlib import Path

_IDENTITY = b"\x7fELF\x02\x01"
"""64-bit little-endian ELF. Other formats are left to their loaders; that of macOS checks the size."""


def check_whole(path: Path) -> None:
    """Raise OSError for an ELF file with fewer bytes than its headers declare; a missing file is left to the loader."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        content = file.read()
    if content.startswith(_IDENTITY) and len(content) < (promised := _promised_bytes(content)):
        raise OSError(
            f"{path} has {len(content)} bytes, but its headers declare {promised}: the file is truncated (disk full, "
            "copy interrupted?). Run `pip install --force-reinstall scout_hf`"
        )


def _promised_bytes(content: bytes) -> int:
    try:
        parts_at, sections_at = struct.unpack_from("<QQ", content, 32)
        part_bytes, parts, section_bytes, sections = struct.unpack_from("<4H", content, 54)
        ends = [64, parts_at + parts * part_bytes, sections_at + sections * section_bytes]
        for part in range(parts):
            offset, _, _, size = struct.unpack_from("<4Q", content, parts_at + part * part_bytes + 8)
            ends.append(offset + size)
    except struct.error:  # truncated within the headers
        return len(content) + 1
    return max(ends)
