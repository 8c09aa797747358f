"""``session.json``, which says what the other files of a session are: read by itself, without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import xxhash

from scout_hf.errors import ConfigError, MissingFileError, SessionError
from scout_hf.files import read_json
from scout_hf.rules import anything, count, fields, items, table, text

__all__ = ["ABOUT", "FORMAT", "hash_of", "read_about"]

FORMAT = "scout_hf.session/1"
ABOUT = "session.json"
LARGEST_ABOUT = 64 << 20
_REMEDY = "save it again with cache.save(path)"

_RULE = fields(
    {
        "format": text(200),
        "made": table(text(200)),
        "model": table(anything),
        "settings": table(anything),
        "about": table(anything),
        "state": anything,
        "hash": text(64),
        "pages": fields({"bytes": count(), "header": text(64), "names": items(text(1000))}),
        "tensors": fields({"bytes": count(), "hash": text(64)}),
    }
)


def read_about(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``session.json`` says; nothing else is read.

    Raises
    ------
    SessionError
        If there is no session, or it cannot be used.
    """
    path = Path(path)
    try:
        said = read_json(path / ABOUT, _RULE, _REMEDY, LARGEST_ABOUT)
    except MissingFileError as error:
        raise SessionError(f"{path} holds no session: {error}") from error
    except ConfigError as error:
        raise SessionError(str(error)) from error
    known = said.pop("hash")
    if said["format"] != FORMAT:
        raise SessionError(
            f"{path} has the format {said['format']!r}, and this version of scout_hf reads {FORMAT!r}; "
            "install a version that reads it, or save it again"
        )
    if hash_of(said) != known:
        raise SessionError(f"{path / ABOUT} is damaged: it is not what was written; {_REMEDY}")
    return said


def hash_of(said: dict[str, Any]) -> str:
    """Of what ``session.json`` says, without the hash itself."""
    return xxhash.xxh3_128_hexdigest(json.dumps(said, sort_keys=True).encode())
