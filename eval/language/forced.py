"""What a setting makes of an exam: log-probabilities of given answers, divergence from full attention, and records.

A document is read once by stock attention. Each setting gets its keys and values, reads the last part of the document
itself (so that its digests have seen the queries of a prompt), then each question in one pass, then the answer token by
token, as ``generate()`` would decode it. Questions of equal length are rows of one batch that share the document.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from scout_hf import CACHE, ScoutConfig, Stats
from scout_hf.eval.caches import caches_of, kv_bytes
from scout_hf.eval.decode_path import decode
from scout_hf.eval.language.tasks import Case, Exam, Extraction
from scout_hf.eval.tables import by

LAST_TOKENS = 512
CHUNK = 1024
KEPT = 4096
ROWS = 8
STOCK_BYTES = 1 << 31
"""For rows of a stock cache, which share nothing."""

STEP_COST = 6
"""Of a decode step of a batch, in tokens that are read: what progress is counted in."""

Tick = Callable[[int], Any]


@dataclass(frozen=True)
class Expected:
    """Next-token distributions of full attention at every decode step: the likeliest tokens, and all others as one.

    ids : Tensor (steps, kept) of int64
    log_probs : Tensor (steps, kept) of float32
    """

    ids: torch.Tensor
    log_probs: torch.Tensor

    @classmethod
    def of(cls, log_probs: torch.Tensor) -> Expected:
        """From all log-probabilities, (steps, vocabulary)."""
        best = log_probs.topk(min(KEPT, log_probs.shape[1]), dim=1)
        return cls(best.indices, best.values)

    @classmethod
    def stacked(cls, parts: Sequence[Expected]) -> Expected:
        """All steps of several."""
        return cls(*(torch.cat([getattr(one, name) for one in parts]) for name in ("ids", "log_probs")))

    def at(self, step: int) -> Expected:
        """One step; the last one stands for all that are behind it."""
        step = min(step, len(self.ids) - 1)
        return Expected(self.ids[step : step + 1], self.log_probs[step : step + 1])

    def divergence(self, log_probs: torch.Tensor) -> torch.Tensor:
        """KL divergence of other log-probabilities (steps, vocabulary) from these, in nats, (steps,) of float64.

        Tokens that are not among the likeliest count as one, which can only make it smaller, by next to nothing.
        """
        mine, theirs = self.log_probs.double(), log_probs.gather(1, self.ids).double()
        rests = [(1 - part.exp().sum(1)).clamp(min=1e-12) for part in (mine, theirs)]
        rest = rests[0] * (rests[0].log() - rests[1].log())
        return ((mine.exp() * (mine - theirs)).sum(1) + rest).clamp(min=0)


@dataclass(frozen=True)
class Outcome:
    """Of one case under one setting.

    Of each right answer its log-probability in nats over its tokens, how many these are, and whether greedy decoding
    gives it after all that is before it. Divergences are of every decode step; none for full attention itself.
    """

    task: str
    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]
    right: tuple[bool, ...]
    divergences: tuple[float, ...] = ()


@dataclass(frozen=True)
class Answers:
    """Outcomes of all cases of an exam, and the token ids that were generated for its extraction."""

    outcomes: tuple[Outcome, ...]
    written: tuple[int, ...]


class Reading:
    """A document read by stock attention up to its last part, and the answers of full attention.

    The model is not patched. ``tick`` is called with what was done, in tokens read or as much work: in all
    :func:`cost_of_reading`.
    """

    def __init__(self, model: PreTrainedModel, exam: Exam, tick: Tick = lambda done: None):
        self.model, self.exam = model, exam
        ids = torch.tensor([exam.document], dtype=torch.int64, device=model.device)
        last = min(LAST_TOKENS, ids.shape[1] // 2)
        self.begun, self.rest = DynamicCache(config=model.config), ids[:, -last:]
        for first in range(0, ids.shape[1] - last, CHUNK):
            part = ids[:, first : min(first + CHUNK, ids.shape[1] - last)]
            _read(model, self.begun, part)
            tick(part.shape[1])
        whole = copy.deepcopy(self.begun)
        _read(model, whole, self.rest)
        rows = max(1, min(ROWS, STOCK_BYTES // max(1, sum(kv_bytes(whole).values()))))
        self.expected: list[Expected] = []
        self.full = self._answers(whole, rows, tick)

    def under(self, config: ScoutConfig, tick: Tick = lambda done: None) -> tuple[Answers, Stats]:
        """Answers of all cases under a setting, and the statistics of their decode steps.

        ``tick`` gets :func:`cost_of_asking` in all.
        """
        with caches_of(self.model, config) as caches:
            cache = hand_over(self.begun, caches.new())
            _read(self.model, cache, self.rest)
            caches.handle.reset_stats()
            return self._answers(cache, ROWS, tick), caches.handle.stats()

    def _answers(self, cache: Cache, rows: int, tick: Tick) -> Answers:
        """Full attention, which comes first, says what others are compared with."""
        tick(len(self.rest[0]))
        cases, is_full = self.exam.cases, not self.expected
        outcomes: list[Any] = [None] * len(cases)
        expected: list[Any] = [None] * len(cases)
        for group in _groups(cases, rows):
            chosen = [cases[index] for index in group]
            known = None if is_full else [self.expected[index] for index in group]
            for index, outcome, seen in zip(group, *_forced(self.model, cache, chosen, known)):
                outcomes[index], expected[index] = outcome, seen
                tick(STEP_COST * len(cases[index].forced))
        written = extract(self.model, cache, self.exam.extraction)
        tick(STEP_COST * self.exam.extraction.most)
        if is_full:
            self.expected = expected
        return Answers(tuple(outcomes), tuple(written))


def cost_of_asking(exam: Exam) -> int:
    """Work of one setting, in tokens read."""
    steps = sum(len(case.forced) for case in exam.cases) + exam.extraction.most
    return min(LAST_TOKENS, len(exam.document) // 2) + STEP_COST * steps


def cost_of_reading(exam: Exam) -> int:
    """Work of reading a document and of full attention's answers."""
    return len(exam.document) - min(LAST_TOKENS, len(exam.document) // 2) + cost_of_asking(exam)


@torch.no_grad()
def hand_over(stock: Cache, cache: Cache) -> Cache:
    """Give an empty ScoutCache what a stock cache holds; layers that are stock in both are copied. The ScoutCache."""
    scout = {layer.layer_idx for layer in cache.scout_layers}
    for index, layer in enumerate(stock.layers):
        if index in scout:
            cache.update(layer.keys, layer.values, index)
        else:
            cache.layers[index] = copy.deepcopy(layer)
    return cache


@torch.no_grad()
def decode_steps(model: PreTrainedModel, cache: Cache, cases: Sequence[Case]) -> Iterator[torch.Tensor]:
    """Log-probabilities before each forced token, (cases, vocabulary) of float32; the cache stays as it is.

    Prompts, of equal length, are read in one pass but for their last token; from there on every token is a decode step.
    Rows whose answers are shorter go on with anything.
    """
    fork = copy.deepcopy(cache)
    if len(cases) > 1:
        fork.batch_select_indices(torch.zeros(len(cases), dtype=torch.int64, device=model.device))
    prompts = torch.tensor([case.prompt for case in cases], dtype=torch.int64, device=model.device)
    if prompts.shape[1] > 1:
        _read(model, fork, prompts[:, :-1])
    token = prompts[:, -1:]
    for step in range(max(len(case.forced) for case in cases)):
        yield model(token, **{CACHE: fork}, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
        token = _forced_at(cases, step, model.device)[:, None]


@torch.no_grad()
def extract(model: PreTrainedModel, cache: Cache, extraction: Extraction) -> list[int]:
    """Token ids of the records, generated greedily up to the end of the text; the cache stays as it is."""
    fork = copy.deepcopy(cache)
    prompt = torch.tensor([extraction.prompt], dtype=torch.int64, device=model.device)
    if prompt.shape[1] > 1:
        _read(model, fork, prompt[:, :-1])
    ids = decode(model, fork, prompt[:, -1:], extraction.most)[0].tolist()
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _groups(cases: Sequence[Case], rows: int) -> Iterator[list[int]]:
    """Indices of cases that are decoded together: prompts of equal length, answers of about that."""
    for alike in by(range(len(cases)), lambda index: len(cases[index].prompt)).values():
        alike.sort(key=lambda index: len(cases[index].forced))
        yield from (alike[first : first + rows] for first in range(0, len(alike), rows))


@torch.no_grad()
def _read(model: PreTrainedModel, cache: Cache, ids: torch.Tensor) -> None:
    model(ids, **{CACHE: cache}, logits_to_keep=1)


def _forced_at(cases: Sequence[Case], step: int, device: torch.device) -> torch.Tensor:
    tokens = [case.forced[min(step, len(case.forced) - 1)] for case in cases]
    return torch.tensor(tokens, dtype=torch.int64, device=device)


def _forced(
    model: PreTrainedModel, cache: Cache, cases: Sequence[Case], expected: Sequence[Expected] | None
) -> tuple[list[Outcome], list[Expected]]:
    """Outcomes, and what others are compared with: what was given, else these distributions themselves."""
    each, greedy, divergences, seen = [], [], [], []
    for step, log_probs in enumerate(decode_steps(model, cache, cases)):
        forced = _forced_at(cases, step, log_probs.device)
        each.append(log_probs.gather(1, forced[:, None])[:, 0])
        greedy.append(log_probs.argmax(-1) == forced)
        if expected is None:
            seen.append(Expected.of(log_probs))
        else:
            divergences.append(Expected.stacked([one.at(step) for one in expected]).divergence(log_probs))
    if expected is None:
        expected = [_row(seen, row, len(case.forced)) for row, case in enumerate(cases)]
    found = [torch.stack(part).T.tolist() if part else [()] * len(cases) for part in (each, greedy, divergences)]
    return [_outcome(case, *one) for case, *one in zip(cases, *found)], list(expected)


def _row(steps: Sequence[Expected], row: int, length: int) -> Expected:
    return Expected.stacked([Expected(one.ids[row : row + 1], one.log_probs[row : row + 1]) for one in steps[:length]])


def _outcome(case: Case, each: Sequence[float], greedy: Sequence[bool], divergences: Sequence[float]) -> Outcome:
    return Outcome(
        case.task,
        tuple(sum(each[first:end]) for first, end in case.fields),
        tuple(end - first for first, end in case.fields),
        tuple(all(greedy[first:end]) for first, end in case.fields),
        tuple(divergences[: len(case.forced)]),
    )
