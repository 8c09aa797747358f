"""How the main thread spends a decode step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION, WAIT, SELECTION, MOVING, REST = "attention", "wait", "selection", "moving", "rest"
PARTS = {
    ATTENTION: "attention on the device",
    WAIT: "waiting for CPU or link",
    SELECTION: "selection",
    MOVING: "keeping and moving KV",
    REST: "the rest of the model",
}


def step_shares(model: Any, handle: Any, cache: Any, step: Callable[[], Any], steps: int = 4) -> dict[str, float]:
    """Run some decode steps, and measure the share of each of ``PARTS`` in the main thread's time.

    Parameters
    ----------
    model : PreTrainedModel
        On the CPU: on a GPU this would measure launches only.
    handle : Handle or None
        None for a model that is not patched.
    cache : ScoutCache or DynamicCache
        That the steps use.
    step : callable
        Runs one decode step.
    steps : int
        How many to run.

    Returns
    -------
    dict of str to float
        By the names in ``PARTS``, shares in [0, 1]. Nested calls count for the inner part only.

    Notes
    -----
    Resets the statistics of the handle.

    Examples
    --------
    >>> shares = step_shares(model, handle, cache, lambda: model(ids, **{scout_hf.CACHE: cache}))
    >>> shares["attention"], shares["selection"]
    """
    if handle is not None:
        handle.reset_stats()
    clock, begin = Clock(), time.perf_counter()
    with _watched(model, handle, cache, clock):
        for _ in range(steps):
            step()
    total = time.perf_counter() - begin
    found = dict.fromkeys(PARTS, 0.0) | clock.spent
    if handle is not None:
        # Waiting happens within attention.
        found[WAIT] = min(found[ATTENTION], handle.stats().join_wait_ms * steps / 1e3)
        found[ATTENTION] -= found[WAIT]
    found[REST] = max(0.0, total - sum(found.values()))
    return {name: round(found[name] / total, 4) for name in PARTS}


class Clock:
    """Seconds by name; nested calls count for the inner name only."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, with its time added to ``name``."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            self._inner.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                taken = time.perf_counter() - begin
                self.spent[name] += taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken

        return timed


@contextmanager
def _watched(model: Any, handle: Any, cache: Any, clock: Clock) -> Iterator[None]:
    places = []
    methods = getattr(cache, "methods", [])
    for layer in cache.layers:
        if getattr(layer, "method", None) is None:
            places.append((layer, "update", MOVING))
    for method in methods:
        selector = getattr(method, "selector", None)
        places += [(method, "attend", ATTENTION), (method, "choose_tokens", SELECTION)]
        places += [(method, name, MOVING) for name in ("ahead", "settle", "append")]
        places += [(selector, name, SELECTION) for name in ("pick", "lists")]
    name = model.config._attn_implementation
    before = ALL_ATTENTION_FUNCTIONS[name] if handle is None and name in ALL_ATTENTION_FUNCTIONS else None
    wrapped = []
    for owner, attribute, part in places:
        call = getattr(owner, attribute, None)
        if call is not None:
            wrapped.append((owner, attribute))
            setattr(owner, attribute, clock.around(part, call))
    if before is not None:
        ALL_ATTENTION_FUNCTIONS[name] = clock.around(ATTENTION, before)
    try:
        yield
    finally:
        for owner, attribute in wrapped:
            delattr(owner, attribute)
        if before is not None:
            # Keep an entry of this table only if there was one: it would hide what others register later.
            del ALL_ATTENTION_FUNCTIONS[name]
            if ALL_ATTENTION_FUNCTIONS.get(name) is not before:
                ALL_ATTENTION_FUNCTIONS[name] = before
