"""From the rows of a file to token ids, each row once; what is wrong with a row is kept beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scout_hf.batch.rows import Row
from scout_hf.batch.settings import Settings
from scout_hf.errors import ConfigError

NO_IDS = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class Prompt:
    """One row.

    Attributes
    ----------
    index : int
        Of the row in its file, from 0.
    id : int or str
        The row's own, else its index.
    key : str
        A hash of prompt and settings.
    ids : array (tokens,) of int32
    error : str or None
        Why it cannot be answered.
    """

    index: int
    id: int | str
    key: str
    ids: np.ndarray = field(default_factory=lambda: NO_IDS, repr=False, compare=False)
    error: str | None = None


def prompts_of(rows: Sequence[Row], tokenizer: Any, settings: Settings) -> list[Prompt]:
    """The prompts in order.

    Raises
    ------
    ConfigError
        If two rows have one id, or ids are not all numbers or all words.
    """
    known: dict[int | str, int] = {}
    made, said = [], settings.as_json()
    for index, row in enumerate(rows):
        name = row.get("id")
        name = index if name is None else name
        if not isinstance(name, (int, str)) or isinstance(name, bool):
            raise ConfigError(f"row {index} has the id {name!r}; an id is a whole number or a word")
        if known and type(name) is not type(next(iter(known))):
            raise ConfigError(
                f"row {index} has the id {name!r}, and row 0 has {next(iter(known))!r}: give all rows numbers, or all "
                "of them words; rows without an id are called by their index"
            )
        if name in known:
            raise ConfigError(
                f"rows {known[name]} and {index} are both called {name!r}; give each row an id of its own"
            )
        known[name] = index
        text = [row.get("prompt"), row.get("messages")]
        spelt = json.dumps([text, said], sort_keys=True, default=repr)
        key = hashlib.blake2b(spelt.encode(errors="surrogatepass"), digest_size=16).hexdigest()
        try:
            ids, error = _ids(row, tokenizer, settings), None
        except Exception as reason:  # whatever a tokenizer or a template raises
            ids, error = NO_IDS, f"{type(reason).__name__}: {reason}"
        made.append(Prompt(index, name, key, ids, error))
    return made


def _ids(row: Row, tokenizer: Any, settings: Settings) -> np.ndarray:
    text, messages = row.get("prompt"), row.get("messages")
    if (text is None) == (messages is None):
        raise ConfigError(f"a row has a prompt, or messages; this one has {'both' if text is not None else 'neither'}")
    if messages is None and not isinstance(text, str):
        raise ConfigError(f"a prompt is a text; this one is of type {type(text).__name__}")
    chat = messages is not None or settings.chat
    if chat:
        said = [{"role": "user", "content": text}] if messages is None else list(messages)
        text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    # Not verbose: it would warn of lengths, which workers look at.
    ids = tokenizer(text, add_special_tokens=not chat, verbose=False).input_ids
    if not len(ids):
        raise ConfigError("a prompt has at least one token; this one is empty")
    return np.asarray(ids, dtype=np.int32)
