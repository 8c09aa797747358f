"""What a setting makes of answers that are given: log-probability, right or wrong, and divergence from full attention.

A document is read once by stock attention. Each setting gets its keys and values, reads the last part of the document
itself (so that its digests have seen the queries of a prompt), then each question in one pass, then the answer token by
token, as ``generate()`` would decode it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from scout_hf import CACHE, ScoutConfig, Stats
from scout_hf.eval.caches import caches_of
from scout_hf.eval.language.tasks import Case, Exam

LAST_TOKENS = 512
CHUNK = 1024
KEPT = 4096


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

    Attributes
    ----------
    log_probs : tuple of float
        Of each right answer, in nats, over its tokens.
    right : tuple of bool
        Whether greedy decoding gives it, after all that is before it.
    divergences : tuple of float
        Of every decode step; none for full attention itself.
    """

    task: str
    log_probs: tuple[float, ...]
    right: tuple[bool, ...]
    divergences: tuple[float, ...] = ()


class Reading:
    """A document read by stock attention up to its last part, and the outcomes of full attention.

    Parameters
    ----------
    model : PreTrainedModel
        Not patched.
    exam : Exam
    tick : callable
        Called after every part and case.
    """

    def __init__(self, model: PreTrainedModel, exam: Exam, tick: Callable[[], Any] = lambda: None):
        self.model, self.exam = model, exam
        ids = torch.tensor([exam.document], dtype=torch.int64, device=model.device)
        last = min(LAST_TOKENS, ids.shape[1] // 2)
        self.begun, self.rest = DynamicCache(config=model.config), ids[:, -last:]
        for first in range(0, ids.shape[1] - last, CHUNK):
            _read(model, self.begun, ids[:, first : min(first + CHUNK, ids.shape[1] - last)])
            tick()
        whole = copy.deepcopy(self.begun)
        _read(model, whole, self.rest)
        self.expected, self.full = [], []
        for case in exam.cases:
            found = decode_steps(model, whole, case)
            self.expected.append(Expected.of(found))
            self.full.append(_outcome(case, found, None))
            tick()

    def under(self, config: ScoutConfig, tick: Callable[[], Any] = lambda: None) -> tuple[list[Outcome], Stats]:
        """Outcomes of all cases under a setting, and the statistics of their decode steps."""
        found = []
        with caches_of(self.model, config) as caches:
            cache = hand_over(self.begun, caches.new())
            _read(self.model, cache, self.rest)
            caches.handle.reset_stats()
            for case, expected in zip(self.exam.cases, self.expected):
                found.append(_outcome(case, decode_steps(self.model, cache, case), expected))
                tick()
            return found, caches.handle.stats()


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
def decode_steps(model: PreTrainedModel, cache: Cache, case: Case) -> torch.Tensor:
    """Log-probabilities before each forced token, (forced, vocabulary) of float32; the cache stays as it is.

    The prompt but its last token is read in one pass; from there on every token is a decode step.
    """
    fork = copy.deepcopy(cache)
    if case.prompt[:-1]:
        _read(model, fork, torch.tensor([case.prompt[:-1]], dtype=torch.int64, device=model.device))
    found = []
    for token in (case.prompt[-1], *case.forced[:-1]):
        ids = torch.tensor([[token]], dtype=torch.int64, device=model.device)
        found.append(model(ids, **{CACHE: fork}, logits_to_keep=1).logits[0, -1].float().log_softmax(-1))
    return torch.stack(found)


@torch.no_grad()
def _read(model: PreTrainedModel, cache: Cache, ids: torch.Tensor) -> None:
    model(ids, **{CACHE: cache}, logits_to_keep=1)


def _outcome(case: Case, log_probs: torch.Tensor, expected: Expected | None) -> Outcome:
    forced = torch.tensor(case.forced, dtype=torch.int64, device=log_probs.device)
    each = log_probs.gather(1, forced[:, None])[:, 0]
    greedy = log_probs.argmax(-1) == forced
    return Outcome(
        case.task,
        tuple(float(each[first:end].sum()) for first, end in case.fields),
        tuple(bool(greedy[first:end].all()) for first, end in case.fields),
        () if expected is None else tuple(expected.divergence(log_probs).tolist()),
    )
