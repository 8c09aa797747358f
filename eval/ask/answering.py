"""``scout-hf ask``: questions about a text are answered from what the store has of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

import scout_hf
from scout_hf import CACHE, PrefixStore, ScoutCache
from scout_hf.errors import ConfigError, SessionError
from scout_hf.eval.ask.opening import config_of, listed, load_model, must_fit, progress, text_of
from scout_hf.eval.ask.options import Ask
from scout_hf.eval.ask.prompt import begin_ids, end_ids
from scout_hf.eval.ask.texts import Text, choose, digest_of, model_word, note, texts_in
from scout_hf.eval.settings import single_values_of
from scout_hf.eval.stores import open_store
from scout_hf.prefix import Piece
from scout_hf.sessions import fingerprint


@dataclass(frozen=True)
class Asked:
    """What is asked about.

    Attributes
    ----------
    name : str
    content : str or None
        Of a file; None where the token ids are known.
    known : Text or None
        How this text was read before.
    """

    name: str
    content: str | None
    known: Text | None


class Answer(TextStreamer):
    """Prints an answer as it comes, and notes when its tokens came."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)

    @property
    def first(self) -> float:
        """When the first token came."""
        return self.times[1]

    @property
    def speed(self) -> str:
        """Tokens, and tokens per second behind the first one."""
        tokens, seconds = len(self.times) - 1, self.times[-1] - self.times[1]
        return f"{tokens} tokens" + (f" at {(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 else "")


def run(options: Ask, tell: Callable[[str], Any]) -> None:
    """Answer all questions; answers go to the standard output, all else is told."""
    if empty := [one for one in options.questions if not one.strip()]:
        raise ConfigError(f"a question is empty ({empty[0]!r}): ask something, such as 'What is this text about?'")
    store = open_store(options.store, options.store_limit)
    asked = asked_about(options, store)
    known = asked.known
    settings = [] if known is None else _unlike(known.settings, options.set)
    config, plain = config_of([*settings, *options.set]), options.plain or bool(known and known.plain)
    begun = time.perf_counter()
    model, tokenizer = load_model(options, options.dtype or (known.dtype if known else None), tell)
    loaded = time.perf_counter()
    begin = ids_of(asked, model, tokenizer, options, plain)
    ends = [end_ids(tokenizer, question, plain) for question in options.questions]
    must_fit(model, asked.name, len(begin), max(map(len, ends)) + options.new_tokens)
    tell(f"{asked.name}: {len(begin)} tokens; {options.model} was loaded in {loaded - begun:.1f} s")
    with scout_hf.patch(model, config, store=store) as handle:
        try:
            if asked.content is None:
                note(store, known)
            else:
                settings = [*settings, *options.set]
                name = asked.name if known is None else known.name
                listed(handle, options.model, name, digest_of(asked.content), begin, settings, plain)
        except OSError as error:
            tell(f"{asked.name} could not be listed in the store: {error}")
        waiting = list(zip(options.questions, ends))
        while waiting:
            pieces: tuple[Piece, ...] = ()
            try:
                since = time.perf_counter()
                with progress(asked.name, len(begin)) as tick:
                    made = handle.read(torch.tensor([begin], dtype=torch.int64), tick, must_keep=False)
                pieces = made.pieces
                tell(f"found {made.found} tokens in the store, read {len(begin) - made.found}")
                while waiting:
                    question, end = waiting[0]
                    if len(ends) > 1:
                        tell(f"> {question}")
                    answer = _answer(model, tokenizer, made.cache.fork(), [*begin, *end], options)
                    tell(f"first token after {answer.first - since:.2f} s, {answer.speed}")
                    del waiting[0]
                    since = time.perf_counter()
            except SessionError as error:
                if not store.remove_damaged(pieces):
                    raise
                tell(f"{error}; it was removed, and is read again")


def asked_about(options: Ask, store: PrefixStore) -> Asked:
    """The text of the options; ConfigError if there is none."""
    if options.text is None or not Path(options.text).is_file():
        if options.text is not None and Path(options.text).exists():
            raise ConfigError(f"--text {options.text} is no file; name a file, or a text that was read")
        known = choose(store, options.model, options.text)
        return Asked(known.name, None, known)
    content, word = text_of(Path(options.text)), model_word(options.model)
    same = [one for one in texts_in(store) if one.model == word and one.digest == digest_of(content)]
    return Asked(Path(options.text).name, content, next(iter(same), None))


def ids_of(asked: Asked, model: Any, tokenizer: Any, options: Ask, plain: bool) -> list[int]:
    """Token ids of all prompts up to the end of the text."""
    if asked.content is not None:
        return begin_ids(tokenizer, asked.content, plain, options.tokens)
    if options.tokens is not None:
        raise ConfigError(
            f"--tokens {options.tokens} is for a file; {asked.name} was read, and is asked about as it was"
        )
    known = asked.known
    if known is None or fingerprint(model).key != known.weights:
        raise ConfigError(
            f"{asked.name} was read with other weights than {options.model} has now (another checkpoint, config or "
            "dtype): give its file with --text, which is read again"
        )
    return known.ids


def _unlike(settings: Sequence[str], given: Sequence[str]) -> list[str]:
    """Settings that a text was read with, but for those that are given now."""
    now = single_values_of(given)
    return [one for one in settings if one.partition("=")[0].strip() not in now]


@torch.no_grad()
def _answer(model: Any, tokenizer: Any, cache: ScoutCache, prompt: list[int], options: Ask) -> Answer:
    ids, answer = torch.tensor([prompt], dtype=torch.int64, device=model.device), Answer(tokenizer)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE: cache},
        max_new_tokens=options.new_tokens,
        do_sample=options.sample,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=answer,
    )
    return answer
