"""The texts that were read into a store: a small JSON file of each, beside the segments of its keys and values."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from scout_hf import PrefixStore
from scout_hf.errors import ConfigError
from scout_hf.files import read_json, write_text
from scout_hf.prefix import Piece, block_hashes
from scout_hf.rules import count, fields, flag, items, number, one_of, text

FOLDER, FORMAT = "texts", "scout_hf.text/1"
PRIVATE = 0o700
LARGEST_BYTES = 256 << 20
_WORDS = text(4000)
_RULE = fields(
    {
        "format": one_of(FORMAT),
        "name": _WORDS,
        "model": _WORDS,
        "weights": text(64),
        "root": text(64),
        "block_size": count(1),
        "dtype": text(40),
        "settings": items(_WORDS),
        "plain": flag,
        "digest": text(64),
        "ids": items(count(0, 1 << 31), fewest=1),
        "at": number(0),
    }
)


@dataclass(frozen=True)
class Text:
    """A text as it was read.

    Attributes
    ----------
    name : str
        For people; several texts may have the same.
    model : str
        As it was named, a folder with its whole path.
    weights : str
        One word for config and weights of the model.
    root : str
        What the hashes of its blocks begin with.
    block_size : int
    dtype : str
        Of the model.
    settings : list of str
        As ``--set`` took them.
    plain : bool
        Whether it was read without the chat template.
    digest : str
        Of the text itself.
    ids : list of int
        What every prompt begins with.
    at : float
        When it was last read or asked, in seconds since the epoch.
    path : Path or None
        Its file, once it has one.
    """

    name: str
    model: str
    weights: str
    root: str
    block_size: int
    dtype: str
    settings: list[str]
    plain: bool
    digest: str
    ids: list[int]
    at: float = 0.0
    path: Path | None = None

    def pieces(self, store: PrefixStore) -> list[Piece]:
        """Where the store has it; its first tokens only, if others had to leave."""
        hashes = block_hashes(np.asarray(self.ids), self.block_size, self.root)
        return store.find(self.root, hashes, "") if hashes else []


def digest_of(content: str) -> str:
    """One word for a text."""
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def note(store: PrefixStore, one: Text) -> Text:
    """Write the file of a text, which is then the one that was read last."""
    folder = store.folder / FOLDER
    folder.mkdir(mode=PRIVATE, exist_ok=True)
    said = {name: value for name, value in asdict(one).items() if name != "path"} | {
        "at": time.time(),
        "format": FORMAT,
    }
    word = hashlib.blake2b(f"{one.root} {one.ids}".encode(), digest_size=16).hexdigest()
    path = folder / f"{word}.json"
    write_text(path, json.dumps(said))
    path.chmod(0o600)
    return replace(one, at=said["at"], path=path)


def texts_in(store: PrefixStore) -> list[Text]:
    """All texts of a store, the one read last first. Files that are damaged or of a newer format are left out."""
    found = []
    for path in sorted((store.folder / FOLDER).glob("*.json")):
        with contextlib.suppress(ConfigError):
            said = read_json(path, _RULE, "read the text again", LARGEST_BYTES)
            known = {name: said[name] for name in Text.__dataclass_fields__ if name != "path"}
            found.append(Text(**known, path=path))
    return sorted(found, key=lambda one: -one.at)


def forget(one: Text) -> None:
    """Remove the file of a text; its keys and values stay."""
    if one.path is not None:
        one.path.unlink(missing_ok=True)


def model_word(name: str) -> str:
    """A model as it was named; a folder or file with its whole path."""
    return os.path.realpath(os.path.expanduser(name)) if os.path.exists(os.path.expanduser(name)) else name


def choose(store: PrefixStore, model: str, name: str | None) -> Text:
    """The text of that name that was read with a model, or the one that was read last.

    Raises
    ------
    ConfigError
        If there is none; the message says which there are.
    """
    there, word = texts_in(store), model_word(model)
    fitting = [one for one in there if one.model == word]
    named = [one for one in fitting if name is None or one.name == name]
    if named:
        return named[0]
    what = "no text was read" if name is None else f"there is no file {name}, and no text of that name was read"
    others = ", ".join(sorted({f"{one.name} with {one.model}" for one in (fitting or there)}))
    known = f"there {'are' if ',' in others else 'is'} {others}" if others else "the store has no texts"
    raise ConfigError(f"{what} with {model} in {store.folder}: {known}; try scout-hf read {model} FILE, or --text FILE")
