"""``scout-hf read``: texts are read ahead into a store."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import scout_hf
from scout_hf import Handle
from scout_hf.errors import ConfigError, SessionError
from scout_hf.eval.ask.opening import config_of, decoded, listed, load_model, must_fit, progress, text_of
from scout_hf.eval.ask.options import Read
from scout_hf.eval.ask.pace import in_words
from scout_hf.eval.ask.prompt import begin_ids
from scout_hf.eval.ask.texts import digest_of
from scout_hf.eval.stores import open_store
from scout_hf.planner import ModelShape
from scout_hf.prefix import Reading, block_hashes
from scout_hf.sizes import in_words as size_in_words

STANDARD_INPUT = "-"
FOR_QUESTIONS = 64
"""Tokens of a model's window that a text must leave, if there is to be an answer."""


def run(options: Read, tell: Callable[[str], Any], write: Callable[[str], Any]) -> None:
    """Read all texts; a line of each is written, and what is on the way told.

    ConfigError and its kin before a model is loaded, for all that can be known then; KeyboardInterrupt passes.
    """
    texts, config = contents(options), config_of(options.set)
    store = open_store(options.store, options.store_limit)
    model, tokenizer = load_model(options, options.dtype, tell)
    ids = {name: begin_ids(tokenizer, content, options.plain, options.tokens) for name, content in texts.items()}
    for name, one in ids.items():
        must_fit(model, name, len(one), FOR_QUESTIONS)
        must_be_within(store.limit, model, name, len(one))
    with scout_hf.patch(model, config, store=store) as handle:
        for name, content in texts.items():
            write(_read(handle, options, name, content, ids[name], tell))


def contents(options: Read) -> dict[str, str]:
    """The texts by name, in order."""
    if len(set(options.texts)) < len(options.texts):
        raise ConfigError("a TEXT is named twice: name each once")
    if options.name and len(options.texts) > 1 and not options.together:
        raise ConfigError(f"--name {options.name} is for one text, and there are {len(options.texts)}; add --together")
    parts: dict[str, str] = {}
    for path in options.texts:
        name = "standard input" if str(path) == STANDARD_INPUT else printable(path.name)
        if name in parts and not options.together:
            raise ConfigError(f"two texts have the name {name}: read them one by one, each with a --name")
        content = decoded(sys.stdin.buffer.read(), name) if str(path) == STANDARD_INPUT else text_of(path)
        parts[str(path) if options.together else name] = content
    if options.together:
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        parts = {f"{printable(options.texts[0].name)}{more}": "\n\n".join(parts.values())}
    return {printable(options.name): next(iter(parts.values()))} if options.name else parts


def printable(name: str) -> str:
    """A name without what a terminal or a file in UTF-8 would not show."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def must_be_within(limit: int, model: Any, name: str, tokens: int) -> None:
    """ConfigError if keys and values of a text are larger than the store may be."""
    size = kv_bytes(model, tokens)
    if size > limit:
        raise ConfigError(
            f"{name} has {tokens} tokens, whose keys and values take about {size_in_words(size)}, and the store is "
            f"limited to {size_in_words(limit)}; try --store-limit {-(-size * 5 // (4 << 20))}MiB, or --tokens for its "
            "beginning"
        )


def must_have_place(handle: Handle, name: str, ids: list[int]) -> None:
    """ConfigError if the disk of the store has no room for what is not there yet."""
    root, store = handle.read(torch.tensor(ids[:1], dtype=torch.int64)).root, handle.store
    block = handle.config.block_size
    hashes = block_hashes(ids, block, root)
    pieces = store.find(root, hashes, "") if hashes else []
    size = kv_bytes(handle.model, len(ids) // block * block - (pieces[-1].end * block if pieces else 0))
    free = shutil.disk_usage(store.folder).free
    if size > free:
        raise ConfigError(
            f"the rest of {name} takes about {size_in_words(size)}, and {store.folder} has {size_in_words(free)} free; "
            "try another --store, or scout-hf session prune"
        )


def kv_bytes(model: Any, tokens: int) -> int:
    """About how much the keys and values of so many tokens take; 0 for models whose size is not known before."""
    try:
        shape = replace(ModelShape.of(model.config), item=model.dtype.itemsize)
    except ConfigError:
        return 0
    return tokens * shape.full * shape.kv_bytes


def _read(handle: Handle, options: Read, name: str, content: str, ids: list[int], tell: Callable[[str], Any]) -> str:
    must_have_place(handle, name, ids)
    text = torch.tensor([ids], dtype=torch.int64)
    if not options.unlisted:
        listed(handle, options.model, name, digest_of(content), ids, list(options.set), options.plain)
    start, there = time.perf_counter(), 0

    def tick(tokens: int) -> None:
        nonlocal there
        there = tokens
        show(tokens)

    with progress(name, len(ids)) as show:
        try:
            made = handle.read(text, tick)
        except SessionError as error:
            tell(f"{name}: {error}; it was removed, and is read again")
            made = handle.read(text, tick)
        except KeyboardInterrupt:
            tell(
                f"{name}: stopped at {there} of {len(ids)} tokens, which are kept; the same command goes on from there"
            )
            raise
    return _said(name, made, len(ids), time.perf_counter() - start, handle)


def _said(name: str, made: Reading, tokens: int, seconds: float, handle: Handle) -> str:
    read = made.tokens - made.found
    speed = f" ({read / seconds:.0f} tokens/s)" if read else ""
    kept = f"{made.kept} of {tokens} tokens are kept, {size_in_words(made.size)}"
    if made.kept < made.tokens:
        kept += f": the others had to leave, as {handle.store} is full; raise --store-limit"
    return f"{name}: found {made.found} tokens, read {read} in {in_words(seconds)}{speed}; {kept}"
