"""What a decode step is made of, by the main thread's time; and on a GPU how long it is idle."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import scout_hf
from scout_hf.eval.bench.idle import busy_ms

ATTENTION, WAIT, SELECTION, MOVING, REST = "attention", "wait", "selection", "moving", "rest"
PARTS = {
    ATTENTION: "attention on the device",
    WAIT: "waiting for CPU or link",
    SELECTION: "selection",
    MOVING: "keeping and moving KV",
    REST: "the rest of the model",
}
WATCHED = 4
"""Steps that are taken apart."""


def taken_apart(
    model: PreTrainedModel, handle: scout_hf.Handle | None, cache: Cache, step: Callable[[], Any], milliseconds: float
) -> dict[str, Any]:
    """A few steps more: ``shares`` of a step by the names of ``PARTS``, or with a GPU ``gpu_idle_share``.

    Without a GPU a part is the main thread's time in it, less what it calls of the others. With one that would be the
    time of launches; idle is what is left of ``milliseconds``, an untraced step.
    """
    if model.device.type == "cuda":
        busy = busy_ms(step, WATCHED, model.device)
        return {"gpu_idle_share": max(0.0, 1.0 - busy["busy"] / milliseconds)} if busy else {}
    if handle is not None:
        handle.reset_stats()
    clock, begin = Clock(), time.perf_counter()
    with _watched(model, handle, cache, clock):
        for _ in range(WATCHED):
            step()
    total = time.perf_counter() - begin
    found = dict.fromkeys(PARTS, 0.0) | clock.spent
    if handle is not None:
        # Waiting happens within attention.
        found[WAIT] = min(found[ATTENTION], handle.stats().join_wait_ms * WATCHED / 1e3)
        found[ATTENTION] -= found[WAIT]
    found[REST] = max(0.0, total - sum(found.values()))
    return {"shares": {name: round(found[name] / total, 4) for name in PARTS}}


class Clock:
    """Seconds by name; within a call of one name, calls of another count for that one alone."""

    def __init__(self):
        self.spent: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def around(self, name: str, call: Callable) -> Callable:
        """The same call, its time added to ``name``."""

        def timed(*args, **kwargs):
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
def _watched(model, handle, cache: Cache, clock: Clock) -> Iterator[None]:
    places = []
    for layer in cache.layers:
        method = getattr(layer, "method", None)
        if method is None:
            places.append((layer, "update", MOVING))
            continue
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
            # Without the entry of this table alone, unless there was one: it would hide what others register later.
            del ALL_ATTENTION_FUNCTIONS[name]
            if ALL_ATTENTION_FUNCTIONS.get(name) is not before:
                ALL_ATTENTION_FUNCTIONS[name] = before
