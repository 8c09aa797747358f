"""Answers on the decode path: every question token and every answer token is a separate decode step.

A question fed in one pass would be attended exactly with any cache; only the answer's later tokens would be sparse.
Here only the document is prefilled, and everything after it is decoded, with the same code for a stock cache and a
ScoutCache: one question at a time through ``generate()``, or many together.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from scout_hf import CACHE, ScoutConfig, Stats
from scout_hf.eval.caches import caches_of, kv_bytes
from scout_hf.eval.pocket import Document
from scout_hf.eval.tables import by

Quiz = tuple[torch.Tensor, list[list[int]], list[list[int]]]
"""Token ids of a document, (1, tokens), of the questions about it, and of their answers."""


@dataclass(frozen=True)
class Answer:
    """One answer, the logits (length, vocabulary) it was chosen from, and what it took.

    Steps are question tokens and answer tokens, less the last one, which nothing follows; the seconds of them leave the
    copy of the cache out.
    """

    text: str
    logits: torch.Tensor
    steps: int
    seconds: float


@dataclass(frozen=True)
class Session:
    """All answers that one setting gave, in the order asked; seconds of all prefills, and bytes of the last document.

    ``stats`` are those of the patch; None for stock attention.
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


def quiz(tokenizer: PreTrainedTokenizerBase, document: Document) -> Quiz:
    """A document and all its facts as a quiz."""
    questions, wanted = (
        [tokenize(tokenizer, getattr(fact, name))[0].tolist() for fact in document.facts]
        for name in ("question", "answer")
    )
    return tokenize(tokenizer, document.text), questions, wanted


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

    The cache, as :func:`prefill` left it, is forked (a ScoutCache shares its pages with the fork), all question tokens
    but the last are fed one by one, and ``model.generate()`` continues from there for ``length`` tokens.
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
    """Patch, prefill every document once, answer all its questions, and remove the patch.

    None for ``config`` is stock attention and a stock cache, everything else being the same. ``tick`` is called after
    every document and every answer, for a progress bar.
    """
    answers, seconds, held = [], 0.0, {}
    with caches_of(model, config) as caches:
        for text, questions in documents:
            ids = tokenize(tokenizer, text)
            begin = time.perf_counter()
            cache = prefill(model, caches.new(), ids)
            seconds += time.perf_counter() - begin
            held = kv_bytes(cache)
            tick()
            for question in questions:
                answers.append(answer(model, tokenizer, cache, ids, question, length))
                tick()
        stats = caches.handle and caches.handle.stats()
    return Session(answers, seconds, held, stats)


# -- many questions together ----------------------------------------------------------------------------------------


@dataclass
class Answers:
    """Answer tokens in the order asked, decode steps of all rows, and their time, copies of the cache left out."""

    ids: list[list[int]]
    steps: int = 0
    seconds: float = 0.0

    def right(self, wanted: Sequence[list[int]]) -> int:
        """How many begin with what is wanted."""
        return sum(ids[: len(want)] == want for ids, want in zip(self.ids, wanted))


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    cache: Cache,
    questions: Sequence[list[int]],
    length: int,
    rows: int,
) -> Answers:
    """Greedy answers of ``length`` tokens to each question, as token ids; the cache stays as it is.

    Questions of equal length are decoded as rows of one batch, ``rows`` at most, that share their document's pages;
    each row chooses and attends its own blocks.
    """
    if length < 1 or rows < 1 or not all(questions):
        raise ValueError(f"length={length}, rows={rows}, {questions=}: length and rows from 1 up, no question empty")
    found = Answers([[] for _ in questions])
    for alike in by(range(len(questions)), lambda index: len(questions[index])).values():
        for first in range(0, len(alike), rows):
            chosen = alike[first : first + rows]
            ids = torch.tensor([questions[index] for index in chosen], dtype=torch.int64, device=model.device)
            twin = copy.deepcopy(cache)
            twin.batch_select_indices(torch.zeros(len(chosen), dtype=torch.int64, device=model.device))
            begin = time.perf_counter()
            given = decode(model, twin, ids, length)
            found.seconds += time.perf_counter() - begin
            found.steps += len(chosen) * (ids.shape[1] + length - 1)
            for index, answer in zip(chosen, given.tolist()):
                found.ids[index] = answer
    return found


@torch.no_grad()
def decode(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, length: int) -> torch.Tensor:
    """Feed ``ids`` (rows, n) token by token and go on greedily; the new tokens, (rows, length)."""
    for place in range(ids.shape[1] - 1):
        model(ids[:, place : place + 1], **{CACHE: cache}, logits_to_keep=1)
    token, given = ids[:, -1:], []
    for _ in range(length):
        token = model(token, **{CACHE: cache}, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        given.append(token)
    return torch.cat(given, dim=1)
