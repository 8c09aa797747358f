"""One document for several modes: read once, asked from copies of its cache, by ``model.generate()``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from transformers import Cache, DynamicCache, LogitsProcessor, PreTrainedModel

from scout_hf import CACHE, ScoutConfig
from scout_hf.eval.caches import caches_of, kv_bytes, tensor_bytes
from scout_hf.eval.clock import Clock
from scout_hf.eval.demo.text import Prompts
from scout_hf.eval.language.forced import hand_over

CHUNK = 256
LAST_TOKENS = 256
"""Tokens at the end of the document that every mode reads itself: digests are fitted to the queries of a prompt."""
LENGTH = 6
"""Most tokens after the beginning of an answer."""


@dataclass
class Session:
    """What one mode answered, and what it took.

    Attributes
    ----------
    config : ScoutConfig or None
        None for stock attention.
    texts : list of str
        Answers without their beginnings, in the order asked.
    logits : list of Tensor (tokens, vocabulary)
    step_seconds : list of float
        Of every decode step.
    attended : list of float
        Tokens attended per step, mean over layers and KV heads, of every question.
    digest_bytes : int
        Of one cache.
    """

    config: ScoutConfig | None
    cache: Cache | None = None
    texts: list[str] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    attended: list[float] = field(default_factory=list)
    digest_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """By the median step, which other work on the machine hardly changes."""
        return 1 / median(self.step_seconds)

    @property
    def attended_tokens(self) -> float:
        """Mean over questions."""
        return sum(self.attended) / len(self.attended)


class BeginWith(LogitsProcessor):
    """Lets a text after ``start`` tokens go on with given ones, and the model choose from there."""

    def __init__(self, start: int, tokens: Sequence[int]):
        self.start, self.tokens = start, tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        done = input_ids.shape[1] - self.start
        if done < len(self.tokens):
            scores = torch.full_like(scores, -torch.inf)
            scores[:, self.tokens[done]] = 0
        return scores


@torch.no_grad()
def read(model: PreTrainedModel, ids: Sequence[int], tick: Callable[[int], Any] = lambda done: None) -> DynamicCache:
    """A stock cache of a document but its last part, in pieces; ``tick`` gets the tokens of each."""
    cache = DynamicCache(config=model.config)
    stop = len(ids) - min(LAST_TOKENS, len(ids) // 2)
    for first in range(0, stop, CHUNK):
        piece = ids[first : min(first + CHUNK, stop)]
        _pass(model, cache, piece)
        tick(len(piece))
    return cache


@torch.no_grad()
def open_session(
    model: PreTrainedModel, begun: DynamicCache, ids: Sequence[int], config: ScoutConfig | None
) -> Session:
    """A mode's own cache of the whole document; what ``begun`` lacks of it is read."""
    with caches_of(model, config) as caches:
        cache = caches.new()
        cache = copy.deepcopy(begun) if config is None else hand_over(begun, cache)
        _pass(model, cache, ids[begun.get_seq_length() :])
        return Session(config, cache, digest_bytes=kv_bytes(cache).get("digests", 0))


@torch.no_grad()
def ask(model: PreTrainedModel, tokenizer: Any, session: Session, prompt: Sequence[int], begin: Sequence[int]) -> None:
    """Ask one question from a copy of a session's cache, and note the answer there.

    The question is read in one pass. The beginning of the answer is given, and each of its tokens is a decode step, as
    are those that the model chooses.
    """
    with caches_of(model, session.config) as caches:
        fork, clock = copy.deepcopy(session.cache), Clock()
        ids = torch.tensor([prompt], dtype=torch.int64, device=model.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE: fork},
            max_new_tokens=len(begin) + LENGTH,
            do_sample=False,
            logits_processor=[BeginWith(len(prompt), begin)],
            streamer=clock,
            output_logits=True,
            return_dict_in_generate=True,
        )
        stats = caches.handle and caches.handle.stats()
    new = out.sequences[0, len(prompt) + len(begin) :]
    session.texts.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    session.logits.append(torch.cat(out.logits))
    # The first token comes out of the prompt's pass.
    session.step_seconds += [after - before for before, after in zip(clock.times[1:], clock.times[2:])]
    session.attended.append(stats.attended_tokens if stats else len(prompt) + (len(out.logits) - 1) / 2)


def ask_all(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Prompts,
    asked: Sequence[int],
    sessions: Sequence[Session],
    tick: Callable[[int], Any] = lambda done: None,
) -> None:
    """Ask every session each question in turn, so that all modes meet the same state of the machine."""
    for index in asked:
        for session in sessions:
            ask(model, tokenizer, session, prompts.whole[index], prompts.begins[index])
            tick(1)


def bytes_per_token(cache: DynamicCache) -> float:
    """Of keys and values of all layers."""
    held = tensor_bytes([[layer.keys, layer.values] for layer in cache.layers])
    return held / cache.get_seq_length()


def _pass(model: PreTrainedModel, cache: Cache, ids: Sequence[int]) -> None:
    model(torch.tensor([ids], dtype=torch.int64, device=model.device), **{CACHE: cache}, logits_to_keep=1)
