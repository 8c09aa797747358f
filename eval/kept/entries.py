"""What is kept on disk, as entries of a list: saved sessions, texts of stores, and what else stores hold."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from scout_hf import PrefixStore
from scout_hf.errors import MissingFileError, SessionError
from scout_hf.eval.ask.texts import FOLDER, Text, texts_in
from scout_hf.eval.stores import open_store
from scout_hf.prefix import Segment
from scout_hf.session_file import ABOUT, read_about

LOCK = "lock"
SHOWN = 8
"""Digits of the hash of weights in a list."""
SESSION, TEXT, OTHERS = "session", "text", "other prompts"


@dataclass(frozen=True)
class Entry:
    """One line of a list.

    Attributes
    ----------
    what : str
        "session", "text" (of a store, that was read with ``scout-hf read`` or ``ask``), or "other prompts" of a store.
    name : str
        The path of a session, the name of a text.
    model : str or None
        Its model type; None where nothing is left of it.
    tokens : int
    kept : int
        How many of them are there.
    size : int
        Bytes. Texts that begin alike share some.
    used : float
        When it was last used, in seconds since the epoch; of a session, when it was saved.
    made : dict of str
        When, and by which versions.
    folders : tuple of Path
        Where it is.
    text : Text or None
        Of a text.
    problem : str or None
        Why it cannot be used.
    weights : str or None
        The hash of its model's weights, which tells checkpoints of one type apart.
    """

    what: str
    name: str
    model: str | None
    tokens: int
    kept: int
    size: int
    used: float
    made: dict[str, str] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()
    text: Text | None = None
    problem: str | None = None
    weights: str | None = None

    @property
    def of(self) -> str | None:
        """Its model for a list: as it was named where that was kept, else its type, and the begin of the hash."""
        name = self.model if self.text is None else PurePath(self.text.model).name
        return name and f"{name} {(self.weights or '')[:SHOWN]}".rstrip()

    def as_json(self) -> dict[str, Any]:
        """Plain data, without token ids."""
        names = ("what", "name", "model", "tokens", "kept", "size", "used", "made", "problem", "weights")
        return {name: getattr(self, name) for name in names} | {"folders": [str(path) for path in self.folders]}


def is_session(path: Path) -> bool:
    """Whether a folder is a saved session, maybe a damaged one."""
    return (path / ABOUT).is_file()


def is_store(path: Path) -> bool:
    """Whether a folder is a prefix store."""
    return path.is_dir() and ((path / LOCK).is_file() or (path / FOLDER).is_dir())


def entries_of(path: Path) -> Iterator[Entry]:
    """A session, the sessions in a folder, or what a store holds.

    Raises
    ------
    MissingFileError
        If it is none of them.
    """
    if is_session(path):
        yield session_entry(path)
    elif is_store(path):
        yield from store_entries(open_store(path, None, there=True))
    else:
        inside = sorted(each for each in path.iterdir() if is_session(each)) if path.is_dir() else []
        if not inside:
            what = "holds no session and is no store" if path.is_dir() else "is not there, or no folder"
            raise MissingFileError(f"{path} {what}; name a folder that cache.save() or scout-hf read made")
        yield from map(session_entry, inside)


def session_entry(path: Path) -> Entry:
    """A saved session; of a damaged one what can be known."""
    size = folder_bytes(path)
    used = (path / ABOUT).stat().st_mtime
    try:
        said = read_about(path)
    except SessionError as error:
        return Entry(SESSION, str(path), None, 0, 0, size, used, folders=(path,), problem=str(error))
    tokens = said["about"].get("tokens")
    tokens = tokens if isinstance(tokens, int) else 0
    made, weights = said["made"], _weights(said)
    return Entry(SESSION, str(path), _model_type(said), tokens, tokens, size, used, made, (path,), weights=weights)


def folder_bytes(path: Path) -> int:
    """Of the files in a folder; 0 if another process has removed it."""
    try:
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    except FileNotFoundError:
        return 0


def store_entries(store: PrefixStore) -> Iterator[Entry]:
    """The texts of a store, the last used first, and one entry per model of what belongs to none of them."""
    known: set[Path] = set()
    for text in texts_in(store):
        entry = text_entry(store, text)
        known.update(entry.folders)
        yield entry
    rest: dict[str, list[Segment]] = {}
    for segment in store.segments():
        if segment.path not in known:
            rest.setdefault(segment.root, []).append(segment)
    for segments in rest.values():
        yield _others(segments)


def text_entry(store: PrefixStore, text: Text) -> Entry:
    """A text of a store."""
    pieces = text.pieces(store)
    segments = [piece.segment for piece in pieces]
    kept = pieces[-1].end * text.block_size if pieces else 0
    said = _first_said(segments)
    return Entry(
        TEXT,
        text.name,
        _model_type(said),
        len(text.ids),
        kept,
        sum(segment.size for segment in segments),
        max((segment.used for segment in segments), default=text.at),
        said.get("made", {}),
        tuple(segment.path for segment in segments),
        text,
        weights=_weights(said),
    )


def _others(segments: list[Segment]) -> Entry:
    said = _first_said(segments)
    block = said.get("settings", {}).get("block_size")
    tokens = sum(segment.end - segment.first for segment in segments) * (block if isinstance(block, int) else 0)
    return Entry(
        OTHERS,
        f"{len(segments)} segment{'s' * (len(segments) > 1)}",
        _model_type(said),
        tokens,
        tokens,
        sum(segment.size for segment in segments),
        max(segment.used for segment in segments),
        said.get("made", {}),
        tuple(segment.path for segment in segments),
        weights=_weights(said),
    )


def unreadable(store: PrefixStore) -> list[Path]:
    """Folders of a store that are segments and cannot be used: damaged, or of a newer format."""
    known = {segment.path for segment in store.segments()}
    rooms = [room for room in store.folder.iterdir() if room.is_dir() and room.name != FOLDER]
    inside = (path for room in rooms for path in room.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(path for path in inside if path not in known)


def _first_said(segments: Iterable[Segment]) -> dict[str, Any]:
    """What the first of them that is still there says of itself."""
    for segment in segments:
        with contextlib.suppress(SessionError):
            return read_about(segment.path)
    return {}


def _model_type(said: dict[str, Any]) -> str | None:
    config = said.get("model", {}).get("config")
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else None


def _weights(said: dict[str, Any]) -> str | None:
    found = said.get("model", {}).get("weights")
    return found if isinstance(found, str) else None
