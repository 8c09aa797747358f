"""One cell measured: what was answered, and what it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from transformers import DynamicCache

import scout_hf
from scout_hf.eval.decode_path import prefill
from scout_hf.eval.fidelity.asking import Answers, answers
from scout_hf.eval.fidelity.cells import TEXT, Cell
from scout_hf.eval.fidelity.cost import cost
from scout_hf.eval.fidelity.inside import inside
from scout_hf.eval.fidelity.memo import AttentionMemo
from scout_hf.eval.fidelity.subjects import Quiz, load_subject, quizzes
from scout_hf.eval.fidelity.text import read_text
from scout_hf.eval.pocket import Fact

# Stock caches, and a digest as large as the keys, are copied whole for every row.
ROWS, LARGE_ROWS = 32, 8
READ_TOGETHER = 32768
"""Tokens of documents that are read in one pass."""


@dataclass(frozen=True)
class Effort:
    """How much is asked in a cell.

    Attributes
    ----------
    questions : int
        Per cell.
    windows, steps : int
        Pieces of held-out text, and tokens of each that are scored.
    watched : int
        Questions (or windows) whose layers are looked into.
    seed : int
        What documents and texts are drawn from.
    """

    questions: int = 48
    windows: int = 16
    steps: int = 64
    watched: int = 4
    seed: int = 0

    def of(self, cell: Cell) -> dict[str, int]:
        """What of it concerns a cell."""
        names = ("windows", "steps") if cell.task == TEXT else ("questions",)
        return {name: value for name, value in asdict(self).items() if name in (*names, "watched", "seed")}


@lru_cache(maxsize=1)
def _memo() -> AttentionMemo:
    """One per process."""
    return AttentionMemo()


def measure(cell: Cell, effort: Effort) -> dict[str, Any]:
    """The result of a cell, ready for JSON; the same cell and effort give the same answers."""
    begin = time.perf_counter()
    torch.manual_seed(effort.seed)
    with _memo().active():
        if cell.task == TEXT:
            result = read_text(cell, effort.windows, effort.steps, effort.watched, effort.seed)
        else:
            result = ask(cell, effort)
    return result | {"seconds": round(time.perf_counter() - begin, 2)}


def ask(cell: Cell, effort: Effort) -> dict[str, Any]:
    """Exact-match answers of a cell: ``right`` is a string of 0 and 1, in the order of the questions."""
    asked = quizzes(cell.model, cell.task, cell.tokens, effort.questions, effort.seed, cell.stress == "rivals")
    model, _ = load_subject(cell.model, cell.stress)
    together = max(1, READ_TOGETHER // cell.tokens)
    config, right, total = cell.config(), [], Answers([])
    with nullcontext() if config is None else scout_hf.patch(model, config) as handle:
        for first in range(0, len(asked), together):
            part = asked[first : first + together]
            given = _put(cell, handle, [(quiz, fact) for quiz in part for fact in quiz.facts])
            right += given.right
            total.steps, total.seconds = total.steps + given.steps, total.seconds + given.seconds
        stats = handle.stats() if handle else None
    few = [(quiz, fact) for quiz in asked for fact in quiz.facts][: effort.watched]
    found = {"right": "".join("01"[one] for one in right), **cost(total.steps, total.seconds, stats)}
    return found | inside(cell, model, lambda handle: _put(cell, handle, few))


def _put(cell: Cell, handle: scout_hf.Handle | None, asked: Sequence[tuple[Quiz, Fact]]) -> Answers:
    """Read the documents, a row each, and ask; ``right`` of what comes back says which answers were."""
    model, tokenizer = load_subject(cell.model, cell.stress)
    documents = {id(quiz): quiz for quiz, _ in asked}
    owners = [list(documents).index(id(quiz)) for quiz, _ in asked]
    cache = handle.new_cache() if handle else DynamicCache(config=model.config)
    prefill(model, cache, torch.cat([quiz.ids for quiz in documents.values()]))
    questions, wanted = (
        [tokenizer(getattr(fact, name), add_special_tokens=False).input_ids for _, fact in asked]
        for name in ("question", "answer")
    )
    rows = LARGE_ROWS if cell.digest in (None, "oracle") else ROWS
    found = answers(model, cache, questions, owners, max(map(len, wanted)), rows)
    found.right = [answer[: len(one)] == one for answer, one in zip(found.ids, wanted)]
    return found
