"""``budget="auto"``: exact steps while attention to all tokens costs little of a step, sparse ones beyond."""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from scout_hf.sizes import time_in_words

SPARSE_TOKENS = 2048
"""The budget of sparse steps."""

WORTH = 0.08
"""A sparse step must be expected to be faster than an exact one by this share of itself."""

LEAST = SPARSE_TOKENS
"""Contexts up to this are always attended wholly."""

SCORING = 1 / 10
"""Share of the bytes of keys and values that selection reads, about (codes of two bits beside bf16)."""

MEASURED, NEWEST = 5, 15
"""Steps of a kind that must have been measured before they count, and how many of the newest do; their median does."""

AGAIN = 1.25
"""Where sparse steps turn out to be no faster, they are tried again when the context has grown so many times."""

SHORT, TIMING, EXACT, TRYING, SPARSE, NO_FASTER = "short", "timing", "exact", "trying", "sparse", "no faster"
"""Why the next step is exact or sparse."""


class Exact(NamedTuple):
    """Seconds of an exact step: of attention per token of the context, and of all that is not attention."""

    per_token: float
    rest: float


class Seen(NamedTuple):
    """Seconds of both kinds of steps at a context, and whether sparse ones were timed or are reckoned."""

    tokens: int
    exact: float
    sparse: float
    timed: bool

    def __str__(self) -> str:
        sparse = f"a sparse one {time_in_words(self.sparse)}"
        if not self.timed:
            sparse = f"a sparse one should take about {time_in_words(self.sparse)} (not timed yet)"
        return f"at {self.tokens} tokens an exact step takes {time_in_words(self.exact)} and {sparse}"


class Rates:
    """What steps of a patched model take on this machine, with so many rows; shared by its caches."""

    def __init__(self) -> None:
        self._exact: deque[Exact] = deque(maxlen=NEWEST)
        self._sparse: deque[float] = deque(maxlen=NEWEST)
        self._warm = False

    @property
    def exact(self) -> Exact | None:
        """Of an exact step; None until enough were measured."""
        steps = list(self._exact)
        if len(steps) < MEASURED:
            return None
        return Exact(statistics.median(step[0] for step in steps), statistics.median(step[1] for step in steps))

    @property
    def sparse(self) -> float | None:
        """Seconds of attention in a sparse step; None until enough were measured."""
        steps = list(self._sparse)
        return statistics.median(steps) if len(steps) >= MEASURED else None

    def add(self, attention: float, rest: float, tokens: int, exact: bool) -> None:
        """A step with so many tokens per row took so many seconds."""
        if not self._warm:
            self._warm = True  # the first step also makes what later ones use again
        elif exact:
            self._exact.append(Exact(attention / tokens, rest))
        else:
            self._sparse.append(attention)

    def forget_sparse(self) -> None:
        """Measure sparse steps anew."""
        self._sparse.clear()


@dataclass
class AutoBudget:
    """Decides for one cache, step by step, whether a decode step attends to all tokens.

    What reading keys and values takes is measured in exact steps, beside the rest of the step, which is mostly the
    weights. So the turning point depends on the model, the batch and the machine, and may differ a little from run to
    run.

    Attributes
    ----------
    sparse_from : int or None
        Context at which it turned to sparse steps; None while all are exact.
    saving : float
        Share of a step that sparse attention was expected to save there.
    tried_from : int or None
        Context of the last turn to sparse steps that gained nothing.
    sparse_steps : int
        So far.
    decided : str
        Why the last step was exact or sparse, one of the words above: the context is short, exact steps are being
        timed, sparse ones would save too little, they are tried and not timed yet, they are faster, they were not.
    """

    sparse_from: int | None = None
    saving: float = 0.0
    tried_from: int | None = None
    sparse_steps: int = 0
    decided: str = SHORT
    _seen: Seen | None = None
    _not_before: int = field(default_factory=lambda: LEAST)
    _begun: float = 0.0
    _attention: float = 0.0

    def attends_all(self, tokens: int, rates: Rates) -> bool:
        """Whether the next step, with so many tokens per row, attends to all of them."""
        known = rates.exact
        if tokens <= self._not_before or known is None:
            self.sparse_from = None
            return self._exact(SHORT if tokens <= LEAST else TIMING if known is None else EXACT)
        whole, measured = known.per_token * tokens, rates.sparse
        left = whole * min(1.0, SPARSE_TOKENS / tokens + SCORING) if measured is None else measured
        self._seen = Seen(tokens, known.rest + whole, known.rest + left, measured is not None)
        if left >= whole and measured is not None:
            rates.forget_sparse()
            self._not_before = int(tokens * AGAIN)
            return self._given_up()
        saved = whole - left
        # Once sparse, it stays so unless that gains nothing: two kinds of steps in turn would help nobody.
        wanted = WORTH if self.sparse_from is None else WORTH / 4
        if saved <= wanted * (known.rest + left):
            return self._given_up()
        if self.sparse_from is None:
            self.sparse_from, self.saving = tokens, saved / (known.rest + whole)
        self.decided = TRYING if measured is None else SPARSE
        return False

    def _given_up(self) -> bool:
        self.tried_from = self.tried_from if self.sparse_from is None else self.sparse_from
        self.sparse_from = None
        return self._exact(EXACT)

    def _exact(self, why: str) -> bool:
        tried = why == EXACT and self.tried_from is not None and self.sparse_steps
        self.decided = NO_FASTER if tried else why
        return True

    def in_words(self) -> str:
        """What was decided last, for reports."""
        if self.decided == SHORT:
            return f"auto: decode steps are exact up to a context of {LEAST} tokens"
        if self.decided == TIMING:
            return f"auto: decode steps are exact; sparse ones are considered once {MEASURED} exact ones are timed"
        if self.decided == NO_FASTER:
            return (
                f"auto: decode steps are exact now; sparse ones, {self.sparse_steps} so far, the last of them from a "
                f"context of {self.tried_from} tokens on, were no faster"
            )
        if self.decided == EXACT:
            return f"auto: decode steps are exact, as sparse ones gain too little: {self._seen}"
        begun = f"auto: {SPARSE_TOKENS} tokens per step from a context of {self.sparse_from} tokens on, exact before"
        return f"{begun}; {self._seen}"

    def begin(self) -> None:
        """A decode step begins."""
        self._begun, self._attention = time.perf_counter(), 0.0

    def attended(self, seconds: float) -> None:
        """A layer's attention took so long."""
        self._attention += seconds

    def took(self) -> tuple[float, float]:
        """Seconds since the step began: of attention, and of all that is not attention."""
        return self._attention, time.perf_counter() - self._begun - self._attention

    def end(self, tokens: int, exact: bool, rates: Rates, took: tuple[float, ...]) -> None:
        """The step succeeded and took so long, see :meth:`took`."""
        self.sparse_steps += not exact
        attention, rest = took
        rates.add(attention, rest, tokens, exact)
