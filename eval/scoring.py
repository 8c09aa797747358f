"""Log-probabilities on the decode path: a continuation is scored token by token, as it would be generated.

Harnesses run context and continuation in one forward pass, which is dense: every token attends to everything. Here all
but the last token of the context are prefilled, and each later token is a decode step, so that multiple choice and
perplexity measure sparse decoding. Stock and patched models run the same code.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from transformers import Cache, PreTrainedModel

from scout_hf import CACHE

Tokens = Sequence[int]


class Score(NamedTuple):
    """Log-probability of a continuation given its context, in nats, and whether it is the greedy continuation."""

    log_probability: float
    greedy: bool


def decode_steps(pairs: Sequence[tuple[Tokens, Tokens]]) -> int:
    """Decode steps, over all rows, that :func:`score_pairs` takes for these pairs."""
    return sum(len(inputs) + 1 for branches in _plan(pairs).values() for inputs in branches)


@torch.no_grad()
def score_pairs(
    model: PreTrainedModel,
    pairs: Sequence[tuple[Tokens, Tokens]],
    new_cache: Callable[[], Cache],
    batch_size: int = 1,
    tick: Callable[[int], Any] = lambda tokens: None,
) -> list[Score]:
    """Score continuations given their contexts; a context that several continuations share is prefilled once.

    Contexts of unequal length are padded on the left. Continuations that differ in their last token only, such as the
    letters of a multiple choice, share their decode steps too.

    Parameters
    ----------
    model : PreTrainedModel
        Patched, if ``new_cache`` makes ScoutCaches.
    pairs : sequence of (context ids, continuation ids)
        Neither may be empty.
    new_cache : callable
        Makes an empty cache: ``handle.new_cache``, or ``new`` of :func:`scout_hf.eval.caches.caches_of`.
    batch_size : int
        Most rows per pass, prefill and decode.
    tick : callable
        Called with the number of rows after every decode step.

    Returns
    -------
    list of Score
        In the order of the pairs.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least one row per pass is needed")
    for number, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(
                f"pair {number} has {len(context)} tokens of context and {len(continuation)} of continuation; both "
                "need at least one (give the beginning-of-text token as the context of a whole text)"
            )
    plan, scores = _plan(pairs), [Score(0.0, False)] * len(pairs)
    for contexts in _batches(sorted(plan, key=len, reverse=True), batch_size):
        ids, mask = _pad_left(contexts, model.device)
        forward, cache = _Forward(model), new_cache()
        if ids.shape[1] > 1:
            forward(ids[:, :-1], cache, None if mask is None else mask[:, :-1])
        branches = [
            _Branch(row, inputs, numbers, [pairs[number][1][-1] for number in numbers])
            for row, context in enumerate(contexts)
            for inputs, numbers in plan[context].items()
        ]
        branches.sort(key=lambda branch: -len(branch.inputs))
        for begin in range(0, len(branches), batch_size):
            chosen = branches[begin : begin + batch_size]
            # The pages of a ScoutCache are shared with its forks; the last chunk takes the cache itself.
            fork = copy.deepcopy(cache) if begin + batch_size < len(branches) else cache
            rows = torch.tensor([branch.row for branch in chosen], dtype=torch.int64, device=ids.device)
            if rows.tolist() != list(range(len(contexts))):
                fork.reorder_cache(rows)
            _decode(forward, fork, ids[rows, -1:], None if mask is None else mask[rows], chosen, scores, tick)
    return scores


class _Branch(NamedTuple):
    """One row of a decode: what is fed after the context's last token, and which pairs end after it in which token."""

    row: int
    inputs: Tokens
    numbers: list[int]
    last: list[int]


def _plan(pairs: Sequence[tuple[Tokens, Tokens]]) -> dict[Tokens, dict[Tokens, list[int]]]:
    """Numbers of the pairs by context, and then by what is fed after it."""
    plan: dict[Tokens, dict[Tokens, list[int]]] = {}
    for number, (context, continuation) in enumerate(pairs):
        plan.setdefault(tuple(context), {}).setdefault(tuple(continuation[:-1]), []).append(number)
    return plan


def _batches(contexts: list[Tokens], batch_size: int) -> Iterator[list[Tokens]]:
    """Chunks; contexts of one token apart, since nothing of them is prefilled and their rows would be all padding."""
    for _, group in groupby(contexts, key=lambda context: len(context) == 1):
        same = list(group)
        yield from (same[begin : begin + batch_size] for begin in range(0, len(same), batch_size))


def _pad_left(rows: Sequence[Tokens], device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids and mask, (rows, longest); no mask where nothing is padding. Which token pads does not matter: 0."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], dtype=torch.int64, device=device)
    if min(map(len, rows)) == longest:
        return ids, None
    return ids, torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.int64, device=device
    )


class _Forward:
    """A forward pass with what this model takes of positions and ``logits_to_keep``."""

    def __init__(self, model: PreTrainedModel):
        base = getattr(model, "get_base_model", lambda: model)()
        names = inspect.signature(base.forward).parameters
        self.model, self.takes_positions = model, "position_ids" in names
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in names else {}

    def __call__(self, ids: torch.Tensor, cache: Cache, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the last token, (rows, vocabulary), float32; the mask covers what is cached and what is new."""
        options: dict[str, Any] = dict(self.options)
        if mask is not None:
            options["attention_mask"] = mask
            if self.takes_positions:
                options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(ids, **{CACHE: cache}, use_cache=True, **options).logits[:, -1].float()


def _decode(
    forward: _Forward,
    cache: Cache,
    step: torch.Tensor,
    mask: torch.Tensor | None,
    branches: list[_Branch],
    scores: list[Score],
    tick: Callable[[int], Any],
) -> None:
    """Feed ``step`` (rows, 1) and then the branches' inputs, longest first, and write down the scores."""
    lengths = [len(branch.inputs) for branch in branches]
    total = torch.zeros(len(branches), dtype=torch.float64, device=step.device)
    greedy = torch.ones(len(branches), dtype=torch.bool, device=step.device)
    for at in range(lengths[0] + 1):
        going = sum(length >= at for length in lengths)
        if going <= len(step) // 2:
            # Rows that are done leave together once they are the half.
            cache.reorder_cache(torch.arange(going, dtype=torch.int64, device=step.device))
            step, total, greedy = step[:going], total[:going], greedy[:going]
            mask = None if mask is None else mask[:going]
        logits = forward(step, cache, mask)
        tick(going)
        chances, best = logits.log_softmax(-1).double(), logits.argmax(-1)
        for row in range(going):
            if lengths[row] == at:
                for number, token in zip(branches[row].numbers, branches[row].last):
                    said = bool(greedy[row]) and int(best[row]) == token
                    scores[number] = Score(float(total[row] + chances[row, token]), said)
        following = [branch.inputs[at] if at < len(branch.inputs) else 0 for branch in branches[: len(step)]]
        step = torch.tensor(following, dtype=torch.int64, device=step.device)[:, None]
        total, greedy = total + chances.gather(1, step)[:, 0], greedy & (best == step[:, 0])
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
