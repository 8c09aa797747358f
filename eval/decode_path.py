"""Answers on the decode path: every question token and every answer token is its own decode step.

A question fed in one pass would be attended exactly by any cache, and then only the answer's later tokens would show
what block-sparse attention does. Here the document alone is prefilled; everything after it is decoded, by the same
code for a stock cache and a ScoutCache.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import scout_hf
from scout_hf import CACHE, ScoutConfig, Stats


@dataclass(frozen=True)
class Answer:
    """One answer and what it took.

    Attributes
    ----------
    text : str
        The answer's tokens, decoded.
    logits : Tensor (length, vocabulary)
        What each answer token was chosen from.
    steps : int
        Decode steps: question tokens and answer tokens, less the last one, which nothing follows.
    seconds : float
        Time of these steps, the copy of the cache not included.
    """

    text: str
    logits: torch.Tensor
    steps: int
    seconds: float


@dataclass(frozen=True)
class Session:
    """All answers that one setting gave.

    Attributes
    ----------
    answers : list of Answer
        In the order asked.
    prefill_seconds : float
        For all documents together.
    kv_bytes : dict
        By tier, of the last document's cache after its prefill.
    stats : Stats or None
        Of the patch; None for stock attention.
    """

    answers: list[Answer]
    prefill_seconds: float
    kv_bytes: dict[str, int]
    stats: Stats | None

    @property
    def tokens_per_second(self) -> float:
        """Decode steps per second."""
        return sum(one.steps for one in self.answers) / sum(one.seconds for one in self.answers)

    @property
    def attended_share(self) -> float:
        """Tokens attended per decode step over the context, mean over layers, rows and KV heads."""
        return self.stats.attended_tokens / self.stats.context_tokens if self.stats else 1.0


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Token ids of a text without special tokens, (1, tokens)."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


@torch.no_grad()
def prefill(model: PreTrainedModel, cache: Cache, document_ids: torch.Tensor) -> Cache:
    """Fill ``cache`` with a document, ids (1, tokens), in one pass; returns the same cache."""
    model(document_ids, **{CACHE: cache}, logits_to_keep=1)
    return cache


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: Cache,
    document_ids: torch.Tensor,
    question: str,
    length: int,
) -> Answer:
    """The greedy answer to a question about a document that ``cache`` holds; the cache stays as it is.

    The cache is forked (a ScoutCache shares its pages with the fork), all question tokens but the last are fed one by
    one, and ``model.generate()`` goes on from there.

    Parameters
    ----------
    model, tokenizer
        The model may be patched or not; the cache may be of any kind that the model takes.
    cache : Cache
        Exactly ``document_ids``, as :func:`prefill` leaves it.
    document_ids : Tensor (1, tokens)
        What ``generate()`` wants to see of the part that is cached.
    question : str
        Non-empty.
    length : int
        Answer tokens to generate.
    """
    if cache.get_seq_length() != document_ids.shape[1]:
        raise ValueError(
            f"the cache holds {cache.get_seq_length()} tokens, the document has {document_ids.shape[1]}; pass the "
            "cache that prefill(model, cache, document_ids) returned"
        )
    ids = tokenize(tokenizer, question).to(document_ids.device)
    if not ids.shape[1] or length < 1:
        raise ValueError(f"question={question!r}, length={length}: both need at least one token")
    fork = copy.deepcopy(cache)
    begin = time.perf_counter()
    for position in range(ids.shape[1] - 1):
        model(ids[:, position : position + 1], **{CACHE: fork}, logits_to_keep=1)
    prompt = torch.cat([document_ids, ids], dim=1)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **{CACHE: fork},
        max_new_tokens=length,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - begin
    new = out.sequences[0, prompt.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Answer(text, torch.cat(out.logits), ids.shape[1] + len(new) - 1, seconds)


def ask_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ScoutConfig | None,
    documents: Sequence[tuple[str, Sequence[str]]],
    length: int,
    tick: Callable[[], Any] = lambda: None,
) -> Session:
    """Patch, prefill every document once, ask all its questions, remove the patch.

    Parameters
    ----------
    model, tokenizer
        The model unpatched.
    config : ScoutConfig or None
        None for stock attention and a stock cache, everything else being the same.
    documents : sequence of (text, questions)
    length : int
        Tokens per answer.
    tick : callable
        Called after every document and every answer, for a progress bar.
    """
    answers, seconds, held = [], 0.0, {}
    with nullcontext() if config is None else scout_hf.patch(model, config) as handle:
        for text, questions in documents:
            ids = tokenize(tokenizer, text)
            begin = time.perf_counter()
            cache = prefill(model, handle.new_cache() if handle else DynamicCache(config=model.config), ids)
            seconds += time.perf_counter() - begin
            held = kv_bytes(cache)
            tick()
            for question in questions:
                answers.append(answer(model, tokenizer, cache, ids, question, length))
                tick()
        stats = handle.stats() if handle else None
    return Session(answers, seconds, held, stats)


def kv_bytes(cache: Cache) -> dict[str, int]:
    """Bytes that a cache holds, by tier; all of a stock cache is ``stock``."""
    if hasattr(cache, "tier_bytes"):
        return cache.tier_bytes()
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return {"stock": sum(part.numel() * part.element_size() for part in held if part is not None)}
