"""``PrefixStore``: a folder of segments, sessions of some blocks of a text each, found by the hashes of its blocks."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scout_hf.errors import ConfigError, SessionError
from scout_hf.files import clear_scratch, locked_file, remove_folder
from scout_hf.prefix.hashing import HASH_BYTES, common_blocks
from scout_hf.rules import count, fields, flag, text
from scout_hf.session_file import ABOUT, read_about
from scout_hf.sizes import bytes_of

if TYPE_CHECKING:
    from scout_hf.stores.state import State

KIND, LIMIT, LOCK = "prefix/1", "32GiB", "lock"
PRIVATE = 0o700
LOCK_SECONDS = 10.0
TICK_NS = 50_000_000
_NAME = re.compile(r"[0-9a-f]{32}-\d+(-s)?")

_RULE = fields(
    {
        "kind": text(20),
        "root": text(64),
        "before": text(2 * HASH_BYTES),
        "hashes": text(64 << 20),
        "first": count(),
        "paged": count(),
        "states": flag,
        "chain": text(64),
        "digest": text(64),
        "rows": count(),
        "tokens": count(),
    }
)


@dataclass(frozen=True)
class Segment:
    """Some blocks of one text in the store; blocks before them are in other segments.

    Attributes
    ----------
    path : Path
    root : str
        What decides its keys and values beside the tokens.
    before : bytes
        Hash of the block before its first; empty for the first block of a text.
    hashes : bytes
        Of its blocks.
    first : int
        Number of its first block in the text.
    paged : int
        Blocks from its first one whose pages can be used without the rest; the newest may lie elsewhere.
    states : bool
        Whether it holds the states of stock layers after its last block.
    chain : str
        Segments of one chain have equal settings of what a layer holds, and can be opened as one.
    digest : str
        The constants that its digests were made with; empty without digests.
    size : int
        Bytes.
    used : float
        When it was last used, in seconds since the epoch.
    """

    path: Path
    root: str
    before: bytes
    hashes: bytes
    first: int
    paged: int
    states: bool
    chain: str
    digest: str
    size: int
    used: float

    @property
    def end(self) -> int:
        """Blocks of the text up to its end."""
        return self.first + len(self.hashes) // HASH_BYTES


@dataclass(frozen=True)
class Piece:
    """Blocks ``segment.first`` to ``end`` of a text, from one segment."""

    segment: Segment
    end: int


class PrefixStore:
    """Texts that models have read, on disk: ``patch(model, store=...)`` finds the longest known beginning of a prompt.

    Safe for several threads and processes. Files can be read by their owner only. Texts of one model are never served
    to another one: config, weights, adapters and the settings that change keys and values are part of every hash.

    Parameters
    ----------
    folder : path-like
        Made if it is missing; ``~`` is the home folder.
    limit : int or str
        Bytes of all texts together, such as ``"32GiB"``; those that were not used for longest are removed.
    token_ids : bool
        Whether to keep the token ids themselves too, for ``scout-hf session info``. Keys and values tell of a text in
        any case.

    Raises
    ------
    ConfigError
        If the folder belongs to someone else, others may write to it, or the limit is no size.
    OSError
        If it cannot be made.

    Examples
    --------
    >>> store = scout_hf.PrefixStore("kv-store", limit="2GiB")
    >>> with scout_hf.patch(model, store=store):
    ...     tokens = model.generate(**inputs, max_new_tokens=8)
    >>> len(store.segments()) > 0
    True
    """

    def __init__(self, folder: str | os.PathLike[str], *, limit: int | str = LIMIT, token_ids: bool = False):
        self.folder, self.limit, self.token_ids = Path(folder).expanduser().absolute(), bytes_of(limit), token_ids
        self.folder.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        _refuse_unsafe(self.folder)
        self._rooms: dict[Path, _Room] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"PrefixStore({str(self.folder)!r}, limit={self.limit})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixStore:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.folder, self.limit, self.token_ids)

    def segments(self, root: str | None = None) -> list[Segment]:
        """What is in the store, of one root or of all; read anew where the folder has changed.

        Damaged segments and those of a newer format are left out.
        """
        with self._lock:
            return [segment for room in self._refreshed(root) for segment in room.held.values()]

    def _refreshed(self, root: str | None) -> list[_Room]:
        """The rooms of one root or of all, as they are now."""
        folders = [self._room(root)] if root else [path for path in self.folder.iterdir() if path.is_dir()]
        for path in [path for path in self._rooms if not root and path not in folders]:
            del self._rooms[path]
        rooms = [self._rooms.setdefault(path, _Room(path)) for path in folders]
        for room in rooms:
            room.refresh()
        return rooms

    def find(self, root: str, wanted: bytes, chain: str, at_states: bool = False) -> list[Piece]:
        """The longest known beginning of a text.

        Parameters
        ----------
        root : str
        wanted : bytes
            Hashes of the text's blocks, see :func:`scout_hf.prefix.hashing.block_hashes`.
        chain : str
            Preferred where several chains are equally long.
        at_states : bool
            Only beginnings that end where states of stock layers were kept.

        Returns
        -------
        list of Piece
            In order, without gaps, all of one chain; empty if nothing is known.
        """
        with self._lock:
            fitting = [piece for room in self._refreshed(root) for piece in room.fitting(wanted)]
        best: list[Piece] = []
        for name in sorted({piece.segment.chain for piece in fitting}, key=lambda name: name != chain):
            found = _longest([piece for piece in fitting if piece.segment.chain == name], at_states)
            if found and (not best or found[-1].end > best[-1].end):
                best = found
        return best

    def used(self, pieces: Sequence[Piece]) -> None:
        """Note that these segments were used just now; all at one time, so that those behind leave first."""
        now = time.time()
        for piece in pieces:
            with contextlib.suppress(OSError):
                os.utime(piece.segment.path / ABOUT, (now, now))

    def write(
        self, root: str, model: dict[str, Any], settings: dict[str, Any], state: State, about: dict[str, Any], size: int
    ) -> bool:
        """Add a segment, after making room for its ``size`` bytes; False if it is there, or larger than the limit.

        Raises
        ------
        OSError
            If the disk is full or the folder cannot be written to; nothing is left then.
        """
        from scout_hf.sessions import write_session  # imports torch, which a store is listed without

        if size > self.limit:
            return False
        room = self._room(root)
        room.mkdir(mode=PRIVATE, exist_ok=True)
        last = about["hashes"][-2 * HASH_BYTES :]
        path = room / f"{last}-{about['first']}{'-s' if about['states'] else ''}"
        if path.is_dir():
            if not _is_broken(path):
                return False
            remove_folder(path)
        if sum(segment.size for segment in self.segments()) + size > self.limit:
            self.prune(self.limit - size)
        write_session(path, model, settings, state, about | {"kind": KIND, "root": root})
        return True

    def prune(self, limit: int | str | None = None) -> int:
        """Remove what was not used for longest until all together is within a limit, and what killed processes left.

        Parameters
        ----------
        limit : int or str, optional
            Bytes; by default the store's own limit.

        Returns
        -------
        int
            Bytes that were freed.
        """
        limit = self.limit if limit is None else bytes_of(limit)
        freed = 0
        with locked_file(self.folder / LOCK, LOCK_SECONDS):
            for room in self.folder.iterdir():
                if room.is_dir():
                    clear_scratch(room, everything=True)
                    for path in filter(_is_broken, _folders_in(room)):
                        with contextlib.suppress(FileNotFoundError):
                            remove_folder(path)
            held = [_with_use(segment) for segment in self.segments()]
            total = sum(segment.size for segment in held)
            # Those behind first: without what is before them they are of no use.
            for segment in sorted(held, key=lambda segment: (segment.used, -segment.first)):
                if total <= limit:
                    break
                self.remove(segment)
                total, freed = total - segment.size, freed + segment.size
        return freed

    def remove(self, segment: Segment) -> None:
        """Remove a segment; what lies behind it in the same text can no longer be found."""
        with contextlib.suppress(FileNotFoundError):
            remove_folder(segment.path)

    def remove_damaged(self, pieces: Iterable[Piece]) -> int:
        """Remove the segments of these pieces that are not what was written, so that the next call reads them again.

        Those that cannot be read for a reason that may pass, such as missing file descriptors, stay.

        Returns
        -------
        int
            How many were removed.
        """
        from scout_hf.sessions import read_session

        removed = 0
        for segment in {piece.segment for piece in pieces}:
            try:
                read_session(segment.path).check_pages()
            except SessionError as error:
                if not is_shortage(error):
                    self.remove(segment)
                    removed += 1
        return removed

    def _room(self, root: str) -> Path:
        # The whole word is in each segment.
        return self.folder / root[:32]


class _Room:
    """The segments of one root, by the hash of their first block."""

    def __init__(self, path: Path):
        self.path = path
        self.held: dict[Path, Segment] = {}
        self._first: dict[bytes, list[Segment]] = {}
        self._looked = -1

    def refresh(self) -> None:
        """Read what is new, if the folder has changed."""
        try:
            changed = self.path.stat().st_mtime_ns
        except FileNotFoundError:
            self.held, self._first, self._looked = {}, {}, -1
            return
        # Names that appear within one tick of the clock of files leave its time as it is.
        if changed == self._looked and time.time_ns() - changed > TICK_NS:
            return
        there = set(_folders_in(self.path))
        new = {path: found for path in there - self.held.keys() if (found := _read(path)) is not None}
        self.held = {path: segment for path, segment in self.held.items() if path in there} | new
        self._first = {}
        for segment in self.held.values():
            self._first.setdefault(segment.hashes[:HASH_BYTES], []).append(segment)
        self._looked = changed

    def fitting(self, wanted: bytes) -> Iterator[Piece]:
        """What of the segments is part of a text, with the hashes ``wanted``."""
        for start in range(0, len(wanted), HASH_BYTES):
            for segment in self._first.get(wanted[start : start + HASH_BYTES], ()):
                if segment.first * HASH_BYTES == start:
                    yield Piece(segment, segment.first + common_blocks(segment.hashes, wanted[start:]))


def _longest(fitting: list[Piece], at_states: bool) -> list[Piece]:
    for last in sorted(fitting, key=lambda piece: (-piece.end, piece.segment.first)):
        if at_states and not (last.segment.states and last.end == last.segment.end):
            continue
        pieces = [last]
        while (start := pieces[0].segment.first) > 0:
            reaching = [
                piece
                for piece in fitting
                if piece.segment.first < start <= min(piece.end, piece.segment.first + piece.segment.paged)
            ]
            if not reaching:
                break
            before = min(reaching, key=lambda piece: piece.segment.first)
            pieces.insert(0, Piece(before.segment, start))
        else:
            return pieces
    return []


def _folders_in(room: Path) -> Iterator[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in room.iterdir():
            if not path.name.startswith(".") and path.is_dir():
                yield path


def _read(path: Path) -> Segment | None:
    try:
        said = read_about(path)
        about = said["about"]
        _RULE(about)
        if about["kind"] != KIND or not about["root"].startswith(path.parent.name) or not about["hashes"]:
            return None
        hashes, before = bytes.fromhex(about["hashes"]), bytes.fromhex(about["before"])
        used = (path / ABOUT).stat().st_mtime
    except (SessionError, OSError, ValueError):
        return None
    size = said["pages"]["bytes"] + said["tensors"]["bytes"]
    names = {name: about[name] for name in ("root", "first", "paged", "states", "chain", "digest")}
    return Segment(path, before=before, hashes=hashes, size=size, used=used, **names)


def _is_broken(path: Path) -> bool:
    """Whether a folder has the name of a segment and cannot be one any more, of any format."""
    if not _NAME.fullmatch(path.name):
        return False
    try:
        read_about(path)
    except SessionError as error:
        # What a newer version wrote is whole.
        return not is_shortage(error) and "has the format" not in str(error)
    return False


def is_shortage(error: BaseException | None) -> bool:
    """Whether a segment could not be read for a reason that may pass, such as missing file descriptors or rights."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return error is not None and not isinstance(error, FileNotFoundError)


def _with_use(segment: Segment) -> Segment:
    with contextlib.suppress(OSError):
        return Segment(**{**vars(segment), "used": (segment.path / ABOUT).stat().st_mtime})
    return segment


def _refuse_unsafe(folder: Path) -> None:
    found = folder.stat()
    if hasattr(os, "getuid") and found.st_uid not in (os.getuid(), 0):
        raise ConfigError(f"store={str(folder)!r} belongs to someone else; take a folder of your own")
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise ConfigError(
            f"store={str(folder)!r} can be written to by others, who could slip in a text of theirs; "
            f"run: chmod go-w {folder}"
        )


def _again(folder: Path, limit: int, token_ids: bool) -> PrefixStore:
    return PrefixStore(folder, limit=limit, token_ids=token_ids)


def store_of(given: PrefixStore | str | os.PathLike[str]) -> PrefixStore:
    """A store from what ``patch(store=...)`` takes; ConfigError if that is something else or cannot be made."""
    if isinstance(given, PrefixStore):
        return given
    if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
        raise ConfigError(
            f"store={given!r} is not allowed: store takes a folder or a PrefixStore; try store='kv-store'"
        )
    try:
        return PrefixStore(given)
    except OSError as error:
        raise ConfigError(
            f"store={os.fspath(given)!r} cannot be used ({error.strerror or error}); take another folder"
        ) from error


def warn(about: str, error: BaseException) -> None:
    """Say that the store did not do something, which harms nothing but speed."""
    warnings.warn(f"the prefix store {about}: {error}", RuntimeWarning, stacklevel=2)
