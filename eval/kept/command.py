"""``scout-hf session``: ls, info, rm and prune."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from scout_hf import PrefixStore
from scout_hf.errors import ConfigError, MissingFileError, ScoutError, SessionError
from scout_hf.eval.ask.texts import FOLDER as TEXTS
from scout_hf.eval.ask.texts import forget, texts_in
from scout_hf.eval.kept.entries import (
    SESSION,
    TEXT,
    Entry,
    entries_of,
    folder_bytes,
    is_session,
    is_store,
    session_entry,
    store_entries,
    text_entry,
    unreadable,
)
from scout_hf.eval.kept.options import Info, Ls, Prune, Rm
from scout_hf.eval.language.load import ask_at_terminal, located
from scout_hf.eval.stores import open_store
from scout_hf.eval.tables import NONE
from scout_hf.files import remove_folder
from scout_hf.session_file import read_about
from scout_hf.sizes import in_words

FILES = {"session.json", "pages.safetensors", "tensors.safetensors"}
FIRST_TOKENS = 64
Write = Callable[[str], Any]


def ls(options: Ls, write: Write) -> None:
    """List what is there."""
    store = None if options.paths and options.store is None else open_store(options.store, None, there=True)
    found = [entry for path in options.paths for entry in entries_of(path.expanduser())]
    found += [] if store is None else store_entries(store)
    if options.json:
        return write(json.dumps([entry.as_json() for entry in found], indent=1))
    if not found:
        where = [*map(str, options.paths), *([str(store.folder)] if store else [])]
        return write(f"nothing is kept in {', '.join(where)}")
    Console(markup=False, emoji=False).print(_table(found), highlight=False)
    for entry in found:
        if entry.problem:
            write(f"{entry.name}: {entry.problem}")


def _table(found: Sequence[Entry]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_footer=len(found) > 1)
    total = in_words(sum(_own_sizes(found).values()))
    table.add_column("name", "all together", overflow="fold")
    for name in ("what", "model", "tokens", "size", "used", "made"):
        right = name in ("tokens", "size")
        table.add_column(name, total if name == "size" else "", justify="right" if right else "left", no_wrap=True)
    for entry in found:
        tokens = str(entry.tokens) if entry.kept == entry.tokens else f"{entry.kept} of {entry.tokens}"
        made, what = entry.made.get("at", NONE)[:10], "damaged" if entry.problem else entry.what
        table.add_row(entry.name, what, entry.of or NONE, tokens, in_words(entry.size), _in_short(entry.used), made)
    return table


def _own_sizes(found: Sequence[Entry]) -> dict[Path, int]:
    """Bytes of each folder once, though texts may share it."""
    return {path: folder_bytes(path) for entry in found for path in entry.folders}


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _in_short(seconds: float) -> str:
    """The time of today, else the day."""
    day, _, clock = _when(seconds).partition(" ")
    return clock if day == datetime.now().strftime("%Y-%m-%d") else day


def info(options: Info, write: Write, tell: Write) -> bool:
    """Tell everything about one thing; False if it was to be checked and is damaged."""
    path = Path(options.path).expanduser()
    if is_store(path):
        said, folders = _about_store(open_store(path, None, there=True))
    else:
        entry = _found(options.path, options.store)
        said, folders = _about(entry, options.tokenizer, tell), list(entry.folders)
    if options.check:
        said["damaged"] = damaged(folders)
    if options.json:
        write(json.dumps(said, indent=1))
    else:
        for name, value in said.items():
            first, *more = _in_lines(name, value)
            write(f"{name.replace('_', ' '):<15} {first}")
            for line in more:
                write(f"{'':<15} {line}")
    return not said.get("damaged")


def _in_lines(name: str, value: Any) -> list[str]:
    if name == "size":
        return [in_words(value)]
    if name == "used":
        return [_when(value)]
    if name == "damaged" and not value:
        return ["nothing: all of it was read"]
    if isinstance(value, dict):
        return [f"{key}={one!r}" for key, one in value.items()] or [NONE]
    if isinstance(value, list):
        return list(map(str, value)) or [NONE]
    return [NONE] if value is None else str(value).splitlines() or [""]


def _about_store(store: PrefixStore) -> tuple[dict[str, Any], list[Path]]:
    segments = store.segments()
    said = {
        "what": "store",
        "name": str(store.folder),
        "texts": [text.name for text in texts_in(store)],
        "segments": len(segments),
        "size": sum(segment.size for segment in segments),
        "used": max((segment.used for segment in segments), default=store.folder.stat().st_mtime),
        "cannot_be_used": [str(path) for path in unreadable(store)],
    }
    return said, [*(segment.path for segment in segments), *unreadable(store)]


def _about(entry: Entry, tokenizer: str | None, tell: Write) -> dict[str, Any]:
    said = entry.as_json()
    ids: list[int] | None = None
    if entry.text is not None:
        names = ("model", "dtype", "settings", "plain", "block_size")
        said |= {"read_with" if name == "model" else name: getattr(entry.text, name) for name in names}
        ids = entry.text.ids
    elif not entry.problem:
        about = read_about(entry.folders[0])
        said |= {"rows": about["about"].get("rows"), "settings": about["settings"]}
        ids = _first_ids(entry.folders[0])
    said["token_ids"] = "known" if ids else "not kept"
    if tokenizer is not None:
        said["begins"] = _text(tokenizer, ids, tell) if ids else None
    return said


def _first_ids(path: Path) -> list[int] | None:
    """Token ids of the first row of a session; None if they were not kept, or it is damaged."""
    from scout_hf.sessions import read_session

    try:
        known = read_session(path).state.get("known")
        return known["ids"][0, :FIRST_TOKENS].tolist() if known else None
    except (SessionError, LookupError, TypeError, AttributeError):
        return None


def _text(name: str, ids: list[int], tell: Write) -> str:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(located(name, ask_at_terminal, tell))
    except ScoutError:
        raise
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--tokenizer {name} cannot be loaded: {first}; name the model that read it") from error
    return tokenizer.decode(ids[:FIRST_TOKENS]) + (" ..." if len(ids) > FIRST_TOKENS else "")


def damaged(folders: Sequence[Path]) -> list[str]:
    """Read all pages; what is wrong with those that are not what was written."""
    from scout_hf.sessions import read_session

    found = []
    for path in folders:
        try:
            read_session(path).check_pages()
        except (SessionError, OSError) as error:
            found.append(str(error))
    return found


def _found(name: str, folder: Path | None) -> Entry:
    """A session by its path, or a text of the store by its name."""
    path = Path(name).expanduser()
    if is_session(path):
        return session_entry(path)
    there: list[str] = []
    try:
        store = open_store(folder, None, there=True)
    except MissingFileError:
        if folder is not None:
            raise
    else:
        there = [text.name for text in texts_in(store)]
        for text in texts_in(store):
            if text.name == name:
                return text_entry(store, text)
    if (Path(name) / TEXTS).is_dir() or any(Path(name).glob("*/*/session.json")):
        raise MissingFileError(
            f"{name} is a store: delete the folder, or scout-hf session prune --store {name} --limit 1B"
        )
    texts = f"its texts are {', '.join(sorted(set(there)))}" if there else "the store has no texts"
    raise MissingFileError(f"{name} is no session, and no text of the store; {texts}; try scout-hf session ls")


def rm(options: Rm, write: Write, ask: Callable[[str], bool] = ask_at_terminal) -> bool:
    """Remove sessions and texts, all or none; False if the user does not want it."""
    found = [_found(name, options.store) for name in dict.fromkeys(options.paths)]
    for entry in found:
        if entry.what == SESSION:
            _refuse_other_files(Path(entry.name))
    size = in_words(sum(_own_sizes(found).values()))
    if not options.yes and not ask(f"Remove {', '.join(entry.name for entry in found)} ({size})?"):
        return False
    for entry in found:
        for path in _alone(entry, options.store):
            remove_folder(path)
        if entry.text is not None:
            forget(entry.text)
        write(f"removed {entry.name}")
    return True


def _alone(entry: Entry, folder: Path | None) -> list[Path]:
    """The folders of an entry that no other text of its store needs, those behind first."""
    if entry.what != TEXT or entry.text is None:
        return list(entry.folders)
    store = open_store(folder, None, there=True)
    others = [text_entry(store, text) for text in texts_in(store) if text.path != entry.text.path]
    shared = {path for other in others for path in other.folders}
    return [path for path in reversed(entry.folders) if path not in shared]


def _refuse_other_files(path: Path) -> None:
    if path.is_symlink():
        raise ConfigError(f"{path} is a link; name the session itself: {path.resolve()}")
    if strange := sorted(each.name for each in path.iterdir() if each.name not in FILES):
        raise ConfigError(f"{path} holds more than a session ({strange[0]}); remove it by hand, if that is meant")


def prune(options: Prune, write: Write) -> None:
    """Bring a store within its limit, and forget texts of which nothing is left."""
    store = open_store(options.store, options.limit, there=True, option="--limit")
    freed = store.prune()
    left = [text for text in texts_in(store) if not text.pieces(store)]
    for text in left:
        forget(text)
    size = sum(segment.size for segment in store.segments())
    if options.json:
        return write(json.dumps({"freed": freed, "size": size, "forgotten": [text.name for text in left]}))
    forgot = f"; nothing is left of {', '.join(text.name for text in left)}" if left else ""
    write(f"{store.folder}: {in_words(freed)} freed, {in_words(size)} kept{forgot}")
