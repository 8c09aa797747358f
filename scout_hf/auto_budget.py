"""``budget="auto"``: exact steps while attention to all tokens costs little of a step, sparse ones beyond."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

SPARSE_TOKENS = 2048
"""The budget of sparse steps."""

WORTH = 0.08
"""A sparse step must be expected to be faster than an exact one by this share of itself."""

LEAST = SPARSE_TOKENS
"""Contexts up to this are always attended wholly."""

SCORING = 1 / 10
"""Share of the bytes of keys and values that selection reads, at most (codes of two bits in bf16)."""

MEASURED = 2
"""Exact steps that are measured before the first sparse one."""

NEWEST = 0.25
"""Weight of the newest step in a mean."""

AGAIN = 1.25
"""Where sparse steps turn out to be no faster, they are tried again when the context has grown so many times."""


@dataclass
class AutoBudget:
    """Decides for one cache, step by step, whether a decode step attends to all tokens.

    What reading keys and values takes is measured in its own exact steps, beside the rest of the step, which is mostly
    the weights. So the turning point depends on the model, the batch and the machine, and may differ a little from run
    to run.

    Attributes
    ----------
    sparse_from : int or None
        Context at which it turned to sparse steps; None while all are exact.
    saving : float
        Share of a step that sparse attention was expected to save there.
    """

    sparse_from: int | None = None
    saving: float = 0.0
    _exact_steps: int = 0
    _per_token: float = 0.0
    _rest: float = 0.0
    _sparse: float | None = None
    _not_before: int = field(default_factory=lambda: LEAST)
    _begun: float = 0.0
    _attention: float = 0.0

    def attends_all(self, tokens: int) -> bool:
        """Whether the next step, with so many tokens per row, attends to all of them."""
        if tokens <= self._not_before:
            self.sparse_from = None
            return True
        if self._exact_steps <= MEASURED:
            return True
        whole = self._per_token * tokens
        if self._sparse is not None and self._sparse >= whole:
            self._not_before, self._sparse, self.sparse_from = int(tokens * AGAIN), None, None
            return True
        left = whole * min(1.0, SPARSE_TOKENS / tokens + SCORING) if self._sparse is None else self._sparse
        saved = whole - left
        # Once sparse, it stays so unless that gains nothing: two kinds of steps in turn would help nobody.
        wanted = WORTH if self.sparse_from is None else WORTH / 4
        if saved <= wanted * (self._rest + left):
            self.sparse_from = None
            return True
        if self.sparse_from is None:
            self.sparse_from, self.saving = tokens, saved / (self._rest + whole)
        return False

    def in_words(self) -> str:
        """What was decided last, for reports."""
        if self.sparse_from is None:
            return "auto: decode steps are exact"
        return (
            f"auto: {SPARSE_TOKENS} tokens per step from a context of {self.sparse_from} tokens on, which saves "
            f"{self.saving:.0%} of a step there; exact before"
        )

    def begin(self) -> None:
        """A decode step begins."""
        self._begun, self._attention = time.perf_counter(), 0.0

    def attended(self, seconds: float) -> None:
        """A layer's attention took so long."""
        self._attention += seconds

    def end(self, tokens: int, exact: bool) -> None:
        """The step succeeded."""
        rest = time.perf_counter() - self._begun - self._attention
        if not exact:
            self._sparse = _mean(self._sparse, self._attention)
            self._rest = _mean(self._rest, rest)
            return
        self._exact_steps += 1
        if self._exact_steps == 1:
            return  # the first step also makes what later ones use again
        first = self._exact_steps == 2
        self._per_token = _mean(None if first else self._per_token, self._attention / tokens)
        self._rest = _mean(None if first else self._rest, rest)


def _mean(before: float | None, newest: float) -> float:
    return newest if before is None else before + NEWEST * (newest - before)
