"""One cell measured: what was answered, or the perplexity of held-out text, and what it took.

Every token of questions, answers and scored text is read in a decode step of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedModel

from scout_hf import Stats
from scout_hf.diagnostics import cpu_share_history
from scout_hf.eval.caches import Caches, caches_of
from scout_hf.eval.decode_path import Answers, answers, prefill, tokenize
from scout_hf.eval.fidelity.cells import METHODS, TEXT, Cell, Effort
from scout_hf.eval.fidelity.memo import AttentionMemo
from scout_hf.eval.fidelity.subjects import Quiz, load_subject, quizzes
from scout_hf.eval.pocket import Fact
from scout_hf.eval.scoring import score_text

# Stock caches, and a digest as large as the keys, are copied whole for every row.
ROWS, LARGE_ROWS, TEXT_ROWS = 32, 8, 8
READ_TOGETHER = 32768
"""Tokens of documents that are read in one pass."""

LONGEST, STRIDE, WATCHED_STEPS = 8192, 4096, 8
SEEN = ("mass", "output_error", "selection_error", "prediction_error", "block_recall")
"""Fields of :class:`scout_hf.stats.Fidelity` that are kept per layer."""


@lru_cache(maxsize=1)
def _memo() -> AttentionMemo:
    """One per process."""
    return AttentionMemo()


def measure(cell: Cell, effort: Effort) -> dict[str, Any]:
    """The result of a cell, ready for JSON; the same cell and effort give the same answers."""
    begin = time.perf_counter()
    torch.manual_seed(effort.seed)
    with _memo().active():
        result = read_text(cell, effort) if cell.task == TEXT else ask(cell, effort)
    return result | {"seconds": round(time.perf_counter() - begin, 2)}


def ask(cell: Cell, effort: Effort) -> dict[str, Any]:
    """Exact-match answers of a cell: ``right`` is a string of 0 and 1, in the order of the questions."""
    asked = quizzes(cell.model, cell.task, cell.tokens, effort.questions, effort.seed, cell.stress == "rivals")
    model, _ = load_subject(cell.model, cell.stress)
    together = max(1, READ_TOGETHER // cell.tokens)
    right, total = [], Answers([])
    with caches_of(model, cell.config()) as caches:
        for first in range(0, len(asked), together):
            given = _put(
                cell, caches, [(quiz, fact) for quiz in asked[first : first + together] for fact in quiz.facts]
            )
            right += given.right
            total.steps, total.seconds = total.steps + given.steps, total.seconds + given.seconds
        found = {"right": "".join("01"[one] for one in right), **_cost(total.steps, total.seconds, caches)}
    few = [(quiz, fact) for quiz in asked for fact in quiz.facts][: effort.watched]
    return found | _inside(cell, model, lambda caches: _put(cell, caches, few))


def _put(cell: Cell, caches: Caches, asked: Sequence[tuple[Quiz, Fact]]) -> Answers:
    """Read the documents, a row each, and ask; ``right`` of what comes back says which answers were."""
    model, tokenizer = load_subject(cell.model, cell.stress)
    documents = {id(quiz): quiz for quiz, _ in asked}
    owners = [list(documents).index(id(quiz)) for quiz, _ in asked]
    cache = prefill(model, caches.new(), torch.cat([quiz.ids for quiz in documents.values()]))
    questions, wanted = (
        [tokenize(tokenizer, getattr(fact, name))[0].tolist() for _, fact in asked] for name in ("question", "answer")
    )
    rows = LARGE_ROWS if cell.digest in (None, "oracle") else ROWS
    found = answers(model, cache, questions, owners, max(map(len, wanted)), rows)
    found.right = [answer[: len(one)] == one for answer, one in zip(found.ids, wanted)]
    return found


@lru_cache(maxsize=1)
def windows(count: int, steps: int, seed: int) -> torch.Tensor:
    """``count`` pieces of held-out text, (count, LONGEST + steps + 1) token ids.

    Pieces overlap, but what is scored of them, their last ``steps`` tokens, does not. Shorter contexts take the end of
    a piece, so that the tokens that are scored are the same at every length.
    """
    from scout_hf.eval.text import held_out_ids

    length, stride = LONGEST + steps + 1, max(STRIDE, steps)
    return held_out_ids((count - 1) * stride + length, seed)[0].unfold(0, length, stride)


def read_text(cell: Cell, effort: Effort) -> dict[str, Any]:
    """Mean negative log-likelihood per token of each window, in nats, and the CPU's share by layer and step."""
    if cell.tokens > LONGEST:
        raise ValueError(f"{cell}: texts have {LONGEST} tokens of context at most")
    model, _ = load_subject(cell.model, cell.stress)
    ids = windows(effort.windows, effort.steps, effort.seed)[:, LONGEST - cell.tokens :]
    config, losses, shares, tokens, seconds = cell.config(), [], [], 0, 0.0
    with caches_of(model, config) as caches:
        for part in ids.split(TEXT_ROWS):
            times, tick = _ticks()
            with cpu_share_history(caches.handle) if caches.handle else nullcontext({}) as share:
                scores = score_text(model, part, cell.tokens + 1, config, tick)
            losses += (-scores.mean(1)).tolist()
            # What is before the first step is prefill.
            tokens, seconds = tokens + len(part) * (len(times) - 1), seconds + times[-1] - times[0]
            shares.append(dict(share))
        found = {"nll": losses, **_cost(tokens, seconds, caches)}
    if any(shares):
        found["cpu_ratio_by_step"] = {
            str(layer): [sum(of) / len(of) for of in zip(*(share[layer] for share in shares))]
            for layer in sorted(shares[0])
        }
    few = ids[: min(effort.watched, TEXT_ROWS), : cell.tokens + 1 + WATCHED_STEPS]
    return found | _inside(cell, model, lambda caches: score_text(model, few, cell.tokens + 1, caches.handle.config))


def _ticks() -> tuple[list[float], Callable[[int], None]]:
    """Times, and what adds the present one."""
    times: list[float] = []
    return times, lambda _: times.append(time.perf_counter())


def _cost(steps: int, seconds: float, caches: Caches) -> dict[str, Any]:
    """Speed, attended share and what the patch counted."""
    stats: Stats | None = caches.handle and caches.handle.stats()
    found: dict[str, Any] = {"tokens_per_second": steps / seconds, "attended_share": 1.0}
    if stats is None:
        return found
    found["attended_share"] = stats.attended_tokens / stats.context_tokens
    found |= {} if stats.cpu_ratio is None else {"cpu_ratio": stats.cpu_ratio}
    return found | ({} if stats.cosine is None else {"cosine": [layer.cosine for layer in stats.layers]})


def _inside(cell: Cell, model: PreTrainedModel, decode: Callable[[Caches], Any]) -> dict[str, Any]:
    """Means per layer of what the fidelity monitor saw of selection and prediction while ``decode(caches)`` ran.

    A pass of its own beside the one that is timed: watching takes longer than the steps. Nothing of full attention, nor
    of other methods, which the monitor does not know.
    """
    config = None if cell.mode in METHODS else cell.config(monitor=1.0)
    if config is None:
        return {}
    with caches_of(model, config) as caches:
        decode(caches)
        found = [layer.fidelity for layer in caches.handle.stats().layers]
    return {name: [layer and getattr(layer, name) for layer in found] for name in SEEN}
