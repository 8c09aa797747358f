"""A timeline of decode steps: what the main thread, the CPU's threads, copies and a GPU did, and when.

Nothing is recorded outside ``with handle.trace(...)``: the recorder hangs itself into the objects of a step while one
runs, so that other steps cost nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scout_hf.errors import ConfigError

MAIN, GPU, POOL, COPIES, LINK, SLOW_CPU = (
    "main thread", "GPU", "CPU pool", "copies", "link (emulated)", "CPU (emulated)",
)  # fmt: skip
LANES = (MAIN, GPU, POOL, COPIES, LINK, SLOW_CPU)
WRAPPED = ("ahead", "attend", "settle")


@dataclass(frozen=True)
class Span:
    """Something that took from ``begin`` to ``end``, in ns of ``time.perf_counter_ns``.

    ``kind`` is ``step``, ``layer``, ``ahead``, ``attend``, ``settle``, ``join``, ``attention`` (a job of the CPU) or
    ``copy``; ``layer`` the layer that it is for, None for the step.
    """

    lane: str
    kind: str
    layer: int | None
    begin: int
    end: int


class Tracer:
    """Records the last ``steps`` decode steps of a patched model, in the thread that runs them.

    Parameters
    ----------
    layers : sequence of Module
        Of the decoder, for hooks that are there while the tracer is.
    steps : int
    """

    def __init__(self, layers: Any, steps: int):
        self._steps: deque[list[Span]] = deque(maxlen=steps)
        self._spans: list[Span] | None = None
        self._pending: list[Callable[[], None]] = []
        self._undo: list[Callable[[], None]] = []
        self._layer: int | None = None
        self._thread, self._began, self._entered = 0, 0, {}
        self._hooks = []
        for index, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(functools.partial(self._enter, index)))
            self._hooks.append(layer.register_forward_hook(functools.partial(self._leave, index)))

    @property
    def spans(self) -> list[Span]:
        """All that is kept, in the order of steps."""
        return [span for step in self._steps for span in step]

    # -- a step ---------------------------------------------------------------------------------------------------

    def begin(self, step: Any) -> None:
        """A decode step begins; those of other threads than the first one are left alone."""
        self._thread = self._thread or threading.get_ident()
        if threading.get_ident() != self._thread:
            return
        self.end()
        self._spans, self._began = [], time.perf_counter_ns()
        for layer in step.cache.scout_layers:
            if layer.method is not None:
                for name in WRAPPED:
                    self._replace(layer.method, name, functools.partial(self._timed, layer.layer_idx, name))
        self._replace(step.backend, "start", functools.partial(self._job, POOL, "attention"))
        self._replace(step.backend, "copy", functools.partial(self._job, COPIES, "copy"))
        self._replace(step.movers, "submit", self._submit)
        self._replace(step.links, "limit", functools.partial(self._limited, LINK, "copy"))
        self._replace(step.links, "limit_cpu", functools.partial(self._limited, SLOW_CPU, "attention"))
        self._replace(step.counters, "timed", self._waited)

    def end(self) -> None:
        """The step is over, however it ended."""
        if self._spans is None or threading.get_ident() != self._thread:
            return
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        spans, self._spans = self._spans, None
        spans.insert(0, Span(MAIN, "step", None, self._began, time.perf_counter_ns()))
        # What runs beside may end later than the step.
        self._pending.append(functools.partial(self._steps.append, spans))

    def settle(self) -> None:
        """Ask the jobs of past steps when they ran."""
        pending, self._pending = self._pending, []
        for ask in pending:
            ask()

    def close(self) -> None:
        """Take everything away again."""
        self.end()
        self.settle()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    # -- what is hung in --------------------------------------------------------------------------------------------

    def _replace(self, owner: Any, name: str, around: Callable) -> None:
        """Let ``owner.name(...)`` be ``around(the one before, ...)`` until the step ends."""
        before, own = getattr(owner, name), name in owner.__dict__

        def replaced(*args, **kwargs):
            if self._spans is None or threading.get_ident() != self._thread:
                return before(*args, **kwargs)
            return around(before, *args, **kwargs)

        owner.__dict__[name] = replaced
        self._undo.append(lambda: owner.__dict__.__setitem__(name, before) if own else owner.__dict__.pop(name, None))

    def _add(self, *span: Any) -> None:
        if self._spans is not None:
            self._spans.append(Span(*span))

    def _timed(self, layer: int, name: str, before: Callable, *args):
        outer, self._layer = self._layer, layer
        query = next((arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_cuda), None)
        on_device = None if query is None else _DeviceTime(query.device)
        begin = time.perf_counter_ns()
        try:
            return before(*args)
        finally:
            self._add(MAIN, name, layer, begin, time.perf_counter_ns())
            if on_device is not None:
                self._later(GPU, name, layer, on_device.end())
            self._layer = outer

    @contextlib.contextmanager
    def _waited(self, before: Callable, layer: int, name: str) -> Iterator[None]:
        begin = time.perf_counter_ns()
        try:
            with before(layer, name):
                yield
        finally:
            self._add(MAIN, name, layer, begin, time.perf_counter_ns())

    def _job(self, lane: str, kind: str, before: Callable, *args, **kwargs):
        ticket = before(*args, **kwargs)
        if hasattr(ticket, "times"):
            self._later(lane, kind, self._layer, ticket.times)
        return ticket

    def _submit(self, before: Callable, job: Callable, *args):
        ran: list[int] = []

        def timed(*args):
            ran.append(time.perf_counter_ns())
            try:
                return job(*args)
            finally:
                ran.append(time.perf_counter_ns())

        self._later(COPIES, "copy", self._layer, lambda: tuple(ran) if len(ran) == 2 else None)
        return before(timed, *args)

    def _limited(self, lane: str, kind: str, before: Callable, *args):
        ticket = before(*args)
        if hasattr(ticket, "due"):
            self._later(lane, kind, self._layer, lambda: (int(ticket.begin * 1e9), int(ticket.due * 1e9)))
        return ticket

    def _later(self, lane: str, kind: str, layer: int | None, times: Callable[[], tuple[int, int] | None]) -> None:
        spans = self._spans

        def ask() -> None:
            if (found := times()) is not None:
                spans.append(Span(lane, kind, layer, *found))

        self._pending.append(ask)

    def _enter(self, index: int, *_: Any) -> None:
        self._entered[index] = time.perf_counter_ns()

    def _leave(self, index: int, *_: Any) -> None:
        if self._spans is not None and threading.get_ident() == self._thread:
            self._add(MAIN, "layer", index, self._entered[index], time.perf_counter_ns())


class _DeviceTime:
    """From now to ``end`` on a GPU's current stream, told in the time of the host."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.current_stream(device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._begin.record(self._stream)

    def end(self) -> Callable[[], tuple[int, int]]:
        self._end.record(self._stream)
        return self._times

    def _times(self) -> tuple[int, int]:
        # One event now, when the stream is idle, ties the device's clock to the host's.
        self._stream.synchronize()
        now = torch.cuda.Event(enable_timing=True)
        now.record(self._stream)
        now.synchronize()
        here = time.perf_counter_ns()
        return tuple(here - int(event.elapsed_time(now) * 1e6) for event in (self._begin, self._end))


class Trace:
    """What ``with handle.trace(path)`` gives: files that are written when the block ends.

    Attributes
    ----------
    path, image : Path
        The timeline for Perfetto or chrome://tracing, and a picture of it.
    spans : list of Span
        The same, once the block has ended.
    """

    def __init__(self, path: Path):
        self.path, self.image = path, path.with_suffix(".png")
        self.spans: list[Span] = []


@contextlib.contextmanager
def record(handle: Any, path: str | os.PathLike, steps: int) -> Iterator[Trace]:
    """The body of ``Handle.trace``; see there."""
    from scout_hf.trace_files import draw, write

    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps={steps!r} is not allowed: a number of decode steps from 1 up; try 2")
    trace = Trace(Path(path))
    if trace.path.suffix != ".json" or not trace.path.parent.is_dir():
        raise ConfigError(
            f"path={str(path)!r} is not allowed: a file in a folder that exists, ending in .json; try 'step.json'"
        )
    tracer = handle._tracer = Tracer(handle._family.layers(handle._decoder), steps)
    try:
        yield trace
    finally:
        handle._tracer = None
        tracer.close()
        trace.spans = tracer.spans
    if not trace.spans:
        raise ConfigError("nothing was decoded with a ScoutCache inside the block: no step to write; generate() in it")
    write(trace.spans, trace.path)
    draw(trace.spans, trace.image)
