"""Timing calls that compete for a machine: interleaved, in random order, reported as medians and quartiles."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    import resource
except ImportError:  # Windows
    resource = None

Prepare = Callable[[], Callable[[], Any]]
"""Makes ready what a call needs, outside the timing, and returns the call."""


@dataclass(frozen=True)
class Timing:
    """Times of one call, in the order they were taken, and whether the system let others go first meanwhile."""

    seconds: tuple[float, ...]
    preempted: tuple[bool, ...]

    @property
    def median(self) -> float:
        """In seconds."""
        return float(np.median(self.seconds))

    def record(self, bytes_read: float | None = None) -> dict[str, Any]:
        """For JSON, in milliseconds; with the rate in GB/s (1e9 bytes) at the median where bytes are given."""
        low, middle, high = (1e3 * float(value) for value in np.percentile(self.seconds, (25, 50, 75)))
        best = 1e3 * min(self.seconds)
        facts = {"median_ms": middle, "q1_ms": low, "q3_ms": high, "best_ms": best, "n": len(self.seconds)}
        facts["preempted"] = sum(self.preempted)
        if bytes_read is not None:
            facts["gb_per_s"] = bytes_read / self.median / 1e9
        return facts | {"ms": [round(1e3 * value, 4) for value in self.seconds]}


def interleave(calls: Mapping[Any, Prepare], repeat: int | Mapping[Any, int], seed: int = 0) -> dict[Any, Timing]:
    """Time every call so many times, one after the other in an order that is drawn again for every round.

    Calls that are repeated less often are spread evenly over the rounds. Nothing is warmed up here.
    """
    counts = dict.fromkeys(calls, repeat) if isinstance(repeat, int) else repeat
    rounds, order = max(counts.values()), random.Random(seed)
    taken: dict[Any, list[tuple[float, bool]]] = {name: [] for name in calls}
    with _without_collector():
        for index in range(rounds):
            due = [name for name in calls if (index + 1) * counts[name] // rounds > index * counts[name] // rounds]
            for name in order.sample(due, len(due)):
                call, before = calls[name](), preemptions()
                seconds = timed(call)
                taken[name].append((seconds, preemptions() > before))
            gc.collect()
    return {name: Timing(*zip(*pairs)) for name, pairs in taken.items()}


def timed(call: Callable[[], Any]) -> float:
    """Seconds that a call takes; freeing what it returns does not count."""
    begin = time.perf_counter()
    kept = call()
    taken = time.perf_counter() - begin
    del kept
    return taken


def median_of(call: Callable[[], Any], repeat: int) -> float:
    """Median of the seconds that a call takes, after one that is not timed."""
    call()
    return float(np.median([timed(call) for _ in range(repeat)]))


def preemptions() -> int:
    """How often the calling thread was preempted; 0 where the system does not count."""
    who = getattr(resource, "RUSAGE_THREAD", None)
    return 0 if who is None else resource.getrusage(who).ru_nivcsw


@contextmanager
def _without_collector() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    # What is there already need not be looked at again after every round.
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
