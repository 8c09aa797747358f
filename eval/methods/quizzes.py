"""Questions that the trained pocket models get, the same ones for every way that is measured."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from scout_hf.eval.decode_path import tokenize
from scout_hf.eval.pocket import Fact, load_pocket, make_exercise

FIRST_SEED = 50_000
"""Away from the seeds that the pocket models' own evaluation uses."""

subject = lru_cache(maxsize=2)(load_pocket)


class Quiz(NamedTuple):
    """A document as token ids (1, tokens), and the facts of it that are asked for."""

    ids: torch.Tensor
    facts: tuple[Fact, ...]


@lru_cache(maxsize=4)
def quizzes(model: str, task: str, tokens: int, questions: int) -> tuple[Quiz, ...]:
    """Documents with ``questions`` questions in all."""
    _, tokenizer = subject(model)
    found: list[Quiz] = []
    while left := questions - sum(len(quiz.facts) for quiz in found):
        document = make_exercise(task, tokens, FIRST_SEED + len(found))
        found.append(Quiz(tokenize(tokenizer, document.text), document.facts[:left]))
    return tuple(found)
