"""Tokens per second of wall time. No call here synchronises with a device."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch


class Pace:
    """Tokens and seconds of passes with several tokens per row ("prefill") and of decode steps ("decode").

    A pass lasts until the next one of the same ``generate()`` begins, which needs its tokens; so sampling is included.
    The last pass of a call lasts until its own end; on a GPU, where launches return early, it is left out.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set all sums to 0."""
        self._sums = {"prefill": [0, 0.0], "decode": [0, 0.0]}
        self._last: dict[int, _Pass] = {}

    def new_call(self) -> None:
        """The calling thread begins a ``generate()``, which ends its previous pass."""
        last = self._last.pop(threading.get_ident(), None)
        if last is not None:
            _add(self._sums, last, last.end)

    def begin(self, step: Any, inputs: torch.Tensor) -> None:
        """A pass begins; ``inputs`` is (rows, queries, ...)."""
        thread = threading.get_ident()
        last, this = self._last.get(thread), _Pass(step, inputs)
        if last is not None:
            _add(self._sums, last, this.begun if last.leads_to(this) else last.end)
        self._last[thread] = this

    def end(self) -> None:
        """The calling thread's pass succeeded; passes that fail are not counted."""
        last = self._last.get(threading.get_ident())
        if last is not None:
            last.done, last.end = True, time.perf_counter() if last.waits else None

    def add(self, kind: str, tokens: int, seconds: float) -> None:
        """Tokens that passes gave which are not told of by ``begin``, such as drafts and their check."""
        both = self._sums[kind]
        both[0] += tokens
        both[1] += seconds

    def tokens_per_second(self, kind: str) -> float | None:
        """Of all rows together, padding included; None where nothing was measured."""
        sums = {name: list(both) for name, both in self._sums.items()}
        for last in list(self._last.values()):
            _add(sums, last, last.end)
        tokens, seconds = sums[kind]
        return tokens / seconds if seconds else None

    def __reduce__(self) -> tuple[Any, ...]:
        return Pace, ()


class _Pass:
    __slots__ = ("begun", "cache", "done", "end", "queries", "rows", "tokens", "waits")

    def __init__(self, step: Any, inputs: torch.Tensor):
        # The id, not the cache: it must not be kept alive for this.
        self.cache, self.tokens, self.queries, self.rows = id(step.cache), step.tokens, step.queries, inputs.shape[0]
        self.waits = _waits(inputs)
        self.done = False
        self.end: float | None = None
        self.begun = time.perf_counter()

    def leads_to(self, other: _Pass) -> bool:
        """Whether ``other`` continues this pass; a prompt after a decode step may come hours later and does not."""
        continues = other.cache == self.cache and other.tokens == self.tokens + other.queries
        return continues and (other.queries == 1 or self.queries > 1)


def _waits(inputs: torch.Tensor) -> bool:
    """Whether a call returns only when its work is done, as on a CPU."""
    return inputs.is_cpu


def _add(sums: dict[str, list[Any]], last: _Pass, end: float | None) -> None:
    if last.done and end is not None:
        both = sums["decode" if last.queries == 1 else "prefill"]
        both[0] += last.rows * last.queries
        both[1] += end - last.begun
