"""Atomic writing of files, and reading of JSON with limits and checks."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from scout_hf.errors import ConfigError, MissingFileError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LARGEST_BYTES = 256 << 20
DEEPEST = 40
LARGEST_NUMBER = 1e18
# A string up to its end or the end of the text, so that brackets inside strings do not count.
_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], binary: bool = False) -> Iterator[IO[Any]]:
    """An open file that replaces ``path`` at the end of the block; after an error or interrupt ``path`` is unchanged.

    The text goes to a new file with a random name in the same folder, so that planted links are not followed and
    readers see the old file or the new one. An existing ``path`` keeps its permissions.

    Parameters
    ----------
    path : path-like
        If it is a symbolic link, the link is replaced, not what it points to.
    binary : bool
        For bytes; else text, in UTF-8.

    Raises
    ------
    OSError
        If its folder is missing or cannot be written to.
    """
    path = Path(path)
    # File names have a maximum length: take only a part of a long one.
    scratch = path.with_name(f".{path.name[:40]}.{secrets.token_hex(16)}.part")
    try:
        with _create(scratch, path, binary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        _sync_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def put_in_place(made: Path, path: Path) -> None:
    """Give a whole file the name ``path``, for what others write by name; both lie on one file system."""
    with made.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(made, path)
    _sync_folder(path.parent)


FRESH_SECONDS = 10.0


def clear_scratch(path: Path, everything: bool = False) -> None:
    """Remove what killed processes left of their attempts to make the folder ``path``; see :func:`whole_folder`.

    ``everything``: of all attempts in the folder ``path``.
    """
    name = "*" if everything else glob.escape(path.name[:40])
    for left in (path if everything else path.parent).glob(f".{name}.{'?' * 32}.*"):
        if left.suffix in (".part", ".old") and left.is_dir() and not left.is_symlink():
            with contextlib.suppress(OSError), _locked(left) as alone:
                # Between its making and its lock it looks abandoned.
                if alone and time.time() - left.stat().st_mtime > FRESH_SECONDS:
                    shutil.rmtree(left)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether a folder could be locked, which ends with the block or with the process."""
    if fcntl is None:
        yield True
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(number)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], mode: int = 0o777, replace: bool = False) -> Iterator[Path]:
    """A new empty folder that becomes ``path`` at the end of the block; an error or interrupt leaves nothing.

    Parameters
    ----------
    path : path-like
        Nothing, or an empty folder.
    mode : int
        Permissions of the folder; files in it get those of this that fit.
    replace : bool
        Whether ``path`` may hold something, which is removed at the end.

    Raises
    ------
    OSError
        If its parent is missing or cannot be written to, or if ``path`` holds something by the end.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name[:40]}.{secrets.token_hex(16)}.part")
    try:
        scratch.mkdir(mode)
    except OSError as error:
        # Name the folder that the caller knows, not the scratch folder.
        raise OSError(error.errno, error.strerror, str(path)) from error
    former = scratch.with_suffix(".old")
    try:
        with _locked(scratch):
            yield scratch
            for file in scratch.rglob("*"):
                if file.is_file():
                    file.chmod(stat.S_IMODE(file.stat().st_mode) & mode)
                    with file.open("rb") as written:
                        os.fsync(written.fileno())
            if replace and path.is_dir():
                _exchange(scratch, path, former)
            else:
                os.replace(scratch, path)
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def _exchange(new: Path, path: Path, former: Path) -> None:
    """Give ``new`` the name ``path``, whose folder is then called ``new`` or ``former``; at once where Linux can."""
    if sys.platform == "linux":
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        at, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if call is not None and call(at, os.fsencode(new), at, os.fsencode(path), exchange) == 0:
            return
    os.replace(path, former)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(former, path)
        raise


@contextlib.contextmanager
def locked_file(path: Path, seconds: float) -> Iterator[None]:
    """Hold a lock that other processes and threads may want; the file is made if it is missing.

    Raises
    ------
    TimeoutError
        If somebody else has it for so long.
    """
    number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
    try:
        until = time.monotonic() + seconds
        while fcntl is not None:
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise TimeoutError(f"another process has {path} locked for more than {seconds:.0f} s") from error
                time.sleep(0.01)
        yield
    finally:
        os.close(number)


def open_regular(path: Path) -> IO[bytes]:
    """An ordinary file, to be read; OSError for a pipe, which would never end."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(number, "rb")
    if not stat.S_ISREG(os.fstat(number).st_mode):
        file.close()
        raise OSError(f"{path} is not a regular file")
    return file


def remove_folder(path: Path) -> None:
    """Remove a folder: it is gone at once under its name, and :func:`clear_scratch` removes what a kill leaves."""
    scratch = path.with_name(f".{path.name[:40]}.{secrets.token_hex(16)}.old")
    os.replace(path, scratch)
    shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically; see :func:`whole_file`."""
    with whole_file(path) as file:
        file.write(text)


def _create(scratch: Path, path: Path, binary: bool) -> IO[Any]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        number = os.open(scratch, flags, 0o666)
    except OSError as error:
        # Name the file that the caller knows, not the scratch file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        before = path.lstat() if os.path.lexists(path) else None
        if before and stat.S_ISREG(before.st_mode) and hasattr(os, "fchmod"):
            os.fchmod(number, stat.S_IMODE(before.st_mode) & 0o777)
        return os.fdopen(number, "wb") if binary else os.fdopen(number, "w", encoding="utf-8", newline="\n")
    except BaseException:
        os.close(number)
        raise


def _sync_folder(folder: Path) -> None:
    """Write the new name to disk too; some systems cannot open folders."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def check_timeline_path(path: Path, *others: Path) -> None:
    """Raise ConfigError if a timeline cannot be written to ``path``, or the others beside it."""
    if path.suffix != ".json" or not path.parent.is_dir() or any(each.is_dir() for each in (path, *others)):
        raise ConfigError(
            f"path={str(path)!r} is not allowed: path takes a .json file in a folder that exists; try 'step.json'"
        )
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"path={str(path)!r} is not allowed: its folder cannot be written to ({error}); try another folder"
        ) from error


def read_json(
    path: str | os.PathLike[str],
    rule: Callable[[Any], object],
    remedy: str,
    largest_bytes: int = LARGEST_BYTES,
    infinite: bool = False,
) -> Any:
    """The value in a JSON file, checked by a rule.

    Parameters
    ----------
    path : path-like
        An ordinary file.
    rule : callable
        Raises ValueError if the value is wrong; see :mod:`scout_hf.rules`.
    remedy : str
        What to do about a wrong file; part of the error message.
    largest_bytes : int
        Maximum size of the file.
    infinite : bool
        Whether to accept infinities, NaN and numbers beyond ``LARGEST_NUMBER``, as files of other programs have them.

    Raises
    ------
    MissingFileError
        If there is no such file.
    ConfigError
        If it cannot be read, is too large, is nested too deep, is not JSON, or breaks the rule.
    """
    name = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            held = file.read(largest_bytes + 1)
        if len(held) > largest_bytes:
            raise ValueError(f"it is larger than {largest_bytes} bytes")
        found = parse_json(held, infinite)
        rule(found)
    except FileNotFoundError as error:
        raise MissingFileError(f"{name} is missing; {remedy}") from error
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror or error}; {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"{name} cannot be used: {error}; {remedy}") from error
    return found


def parse_json(held: bytes | str, infinite: bool = False) -> Any:
    """The value in a JSON text; ValueError if it is not JSON, nested too deep, or has numbers that are too large."""
    try:
        text = held if isinstance(held, str) else held.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error.reason} at byte {error.start})") from error
    depth = deepest = 0
    for token in _TOKENS.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise ValueError(f"it is nested {deepest} deep; at most {DEEPEST} is allowed")
    try:
        if infinite:
            return json.loads(text)
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, parse_int=_finite_int)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON ({error})") from error


def _refuse(name: str) -> float:
    raise ValueError(f"the number {name:.40} is not allowed")


def _finite(digits: str) -> float:
    value = float(digits)
    return value if abs(value) <= LARGEST_NUMBER else _refuse(digits)


def _finite_int(digits: str) -> int:
    # Check before converting: thousands of digits take long.
    return int(digits) if len(digits) < 20 else int(_refuse(digits))
