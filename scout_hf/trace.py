"""Timelines of decode steps: what the main thread, CPU threads, copies and a GPU did, and when.

The recorder replaces methods of the objects of a step while that step runs inside ``with handle.trace(...)``. Other
steps cost nothing.
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
from scout_hf.kernels.cpu.backend import CpuBackend
from scout_hf.stores.emulated_link import LimitedTicket
from scout_hf.trace_device import DeviceClocks

MAIN, POOL, COPIES, LINK, SLOW_CPU = "main thread", "CPU pool", "copies", "link (emulated)", "CPU (emulated)"
SPANS = {"ahead": "ahead", "attend": "attend", "settle": "settle", "before_replay": "ahead", "after_replay": "settle"}
"""Recorded calls of a method and their kinds; the last two replace the others in steps that a CUDA graph runs."""


@dataclass(frozen=True)
class Span:
    """One event of a timeline. Times are in ns of ``time.perf_counter_ns``.

    Attributes
    ----------
    lane : str
        Where it ran, such as ``main thread`` or ``CPU pool``.
    kind : str
        ``step``, ``layer``, ``ahead``, ``attend``, ``settle``, ``join``, ``attention`` (a job on the CPU), ``copy``, or
        ``device`` (a step on a GPU).
    layer : int or None
        The layer that it is for; None for a step.
    begin, end : int
    submitted : int or None
        When the main thread submitted the job; None for what it does itself.

    Examples
    --------
    >>> waited = sum(span.end - span.begin for span in trace.spans if span.kind == "join")
    """

    lane: str
    kind: str
    layer: int | None
    begin: int
    end: int
    submitted: int | None = None


class _Recorded:
    """The spans of one step, and jobs whose times are not known yet."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._unknown: list[tuple[Callable[[], tuple[int, int] | None], int | None, str, str, int | None]] = []

    def later(
        self,
        times: Callable[[], tuple[int, int] | None],
        submitted: int | None,
        lane: str,
        kind: str,
        layer: int | None,
    ) -> None:
        """Add a span whose begin and end ``times`` returns, or None until they are known."""
        self._unknown.append((times, submitted, lane, kind, layer))

    def ask(self) -> None:
        """Add the spans whose times have become known."""
        unknown, self._unknown = self._unknown, []
        for times, submitted, lane, kind, layer in unknown:
            if (found := times()) is None:
                self._unknown.append((times, submitted, lane, kind, layer))
            else:
                self.spans.append(Span(lane, kind, layer, *found, submitted))


class Tracer:
    """Records the last ``steps`` decode steps of a patched model, in the thread that runs the first one.

    Parameters
    ----------
    layers : sequence of Module
        Of the decoder; they have hooks until ``close``. Without layers nothing is recorded.
    steps : int
    """

    def __init__(self, layers: Any = (), steps: int = 1):
        self._steps: deque[_Recorded] = deque(maxlen=steps)
        self._now: _Recorded | None = None
        self._undo: list[Callable[[], None]] = []
        self._layer: int | None = None
        self._thread = 0
        self._entered: dict[int, tuple[int, Any]] = {}
        self._clocks = DeviceClocks()
        self._devices: list[torch.device] = []
        self._hooks: list[Any] = []
        for index, layer in enumerate(layers):
            self._devices.append(next((weight.device for weight in layer.parameters()), torch.device("cpu")))
            # Before the hook that works ahead, which is part of the layer that it runs in.
            enter = functools.partial(self._enter, index)
            self._hooks.append(layer.register_forward_pre_hook(enter, prepend=True))
            self._hooks.append(layer.register_forward_hook(functools.partial(self._leave, index)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Tracer, ()  # a copy of the model is not traced

    @property
    def open(self) -> bool:
        """Whether steps are being recorded."""
        return bool(self._hooks)

    def spans(self) -> list[Span]:
        """All spans in the order of steps, without jobs that have not ended. Waits for GPUs."""
        self._clocks.settle()
        for step in self._steps:
            step.ask()
        return [span for step in self._steps for span in step.spans]

    # -- a step ---------------------------------------------------------------------------------------------------

    def begin(self, step: Any) -> None:
        """A decode step begins; those of other threads than the first one are not recorded."""
        self._thread = self._thread or threading.get_ident()
        if threading.get_ident() != self._thread or not self.open:
            return
        self._end()
        for recorded in self._steps:
            recorded.ask()  # the native pool keeps times of recent jobs only
        for method in step.cache.methods:
            for name in SPANS:
                if hasattr(method, name):
                    self._replace(method, name, functools.partial(self._timed, method.layer_idx, SPANS[name]))
        self._replace(step.backend, "start", functools.partial(self._job, POOL, "attention"))
        self._replace(step.backend, "start_step", self._step_jobs)
        self._replace(step.backend, "copy", functools.partial(self._job, COPIES, "copy"))
        self._replace(step.movers, "submit", self._moved)
        self._replace(step.links, "limit", functools.partial(self._limited, LINK, "copy"))
        self._replace(step.links, "limit_cpu", functools.partial(self._limited, SLOW_CPU, "attention"))
        self._replace(step.links, "beside", self._beside)
        self._replace(step.counters, "timed", self._waited)
        self._now, self._layer = _Recorded(), None
        self._began, self._marked = time.perf_counter_ns(), self._clocks.mark(self._devices[0])

    def end(self) -> None:
        """The step has ended, with or without an error."""
        if threading.get_ident() == self._thread:
            self._end()

    def close(self) -> None:
        """Remove hooks and replaced methods; recorded steps are kept."""
        self._end()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _end(self) -> None:
        now, self._now = self._now, None
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        if now is not None:
            self._on_device(now, self._devices[0], self._marked, "device", None)
            now.spans.insert(0, Span(MAIN, "step", None, self._began, time.perf_counter_ns()))
            self._steps.append(now)

    # -- replaced methods --------------------------------------------------------------------------------------------

    def _recording(self) -> _Recorded | None:
        """The running step, in the thread that is traced; read once, since another thread may end the block."""
        return self._now if threading.get_ident() == self._thread else None

    def _replace(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Replace ``owner.name(...)`` by ``around(step, previous, ...)`` until the step ends."""
        before, own = getattr(owner, name), name in owner.__dict__

        def replaced(*args: Any, **kwargs: Any) -> Any:
            now = self._recording()
            return before(*args, **kwargs) if now is None else around(now, before, *args, **kwargs)

        owner.__dict__[name] = replaced
        self._undo.append(lambda: owner.__dict__.__setitem__(name, before) if own else owner.__dict__.pop(name, None))

    def _enter(self, index: int, *_: Any) -> None:
        if self._recording() is not None:
            self._entered[index] = time.perf_counter_ns(), self._clocks.mark(self._devices[index])

    def _leave(self, index: int, *_: Any) -> None:
        now = self._recording()
        if now is not None and index in self._entered:
            begin, mark = self._entered.pop(index)
            self._on_device(now, self._devices[index], mark, "layer", index)
            now.spans.append(Span(MAIN, "layer", index, begin, time.perf_counter_ns()))

    def _timed(
        self, layer: int, kind: str, now: _Recorded, before: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        outer, self._layer, device = self._layer, layer, self._devices[layer]
        begin, mark = time.perf_counter_ns(), self._clocks.mark(device)
        try:
            return before(*args, **kwargs)
        finally:
            self._layer = outer
            self._on_device(now, device, mark, kind, layer)
            now.spans.append(Span(MAIN, kind, layer, begin, time.perf_counter_ns()))

    @contextlib.contextmanager
    def _waited(self, now: _Recorded, before: Callable[..., Any], layer: int, name: str) -> Iterator[None]:
        begin = time.perf_counter_ns()
        try:
            with before(layer, name):
                yield
        finally:
            now.spans.append(Span(MAIN, name, layer, begin, time.perf_counter_ns()))

    def _job(self, lane: str, kind: str, now: _Recorded, before: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        submitted, ticket = time.perf_counter_ns(), before(*args, **kwargs)
        if ticket is not None:
            now.later(ticket.times, submitted, lane, kind, self._layer)
        return ticket

    def _step_jobs(self, now: _Recorded, before: Callable[..., Any], jobs: Any) -> Any:
        submitted, ticket = time.perf_counter_ns(), before(jobs)
        for job in jobs.jobs:
            if (own := job.ticket()) is not None:
                now.later(own.times, submitted, POOL, "attention", job.layer)
        return ticket

    def _moved(self, now: _Recorded, before: Callable[..., Any], *args: Any) -> Any:
        # Jobs that get a backend attend; others copy.
        attends = any(isinstance(arg, CpuBackend) for arg in args)
        lane, kind = (POOL, "attention") if attends else (COPIES, "copy")
        return self._job(lane, kind, now, before, *args)

    def _limited(self, lane: str, kind: str, now: _Recorded, before: Callable[..., Any], *args: Any) -> Any:
        submitted, ticket = time.perf_counter_ns(), before(*args)
        if isinstance(ticket, LimitedTicket):
            now.later(ticket.times, submitted, lane, kind, self._layer)
        return ticket

    @contextlib.contextmanager
    def _beside(
        self, now: _Recorded, before: Callable[..., Any], name: str, device: torch.device, *args: Any, **kwargs: Any
    ) -> Iterator[Any]:
        layer = self._layer
        with before(name, device, *args, **kwargs) as end:
            mark = self._clocks.mark(device)
            try:
                yield end
            finally:
                self._on_device(now, device, mark, "copy", layer, name)

    def _on_device(
        self, now: _Recorded, device: torch.device, mark: Any, kind: str, layer: int | None, stream: str = ""
    ) -> None:
        """Add a span for the work on the device's current stream since ``mark``."""
        end = None if mark is None else self._clocks.mark(device)
        if end is not None:
            lane = " ".join(filter(None, (f"GPU {device.index or 0}", stream)))
            now.later(self._clocks.between(device, mark, end), None, lane, kind, layer)


class Trace:
    """Result of ``with handle.trace(path)``, complete when the block has ended.

    Attributes
    ----------
    path, image : Path
        The timeline for Perfetto or chrome://tracing, and a picture of its last step.
    spans : list of Span
        The timeline; empty inside the block.

    Examples
    --------
    >>> with handle.trace("step.json") as trace:
    ...     tokens = model.generate(**inputs, max_new_tokens=8)
    >>> trace.image.name
    'step.png'
    """

    def __init__(self, path: Path):
        self.path, self.image = path, path.with_suffix(".png")
        self.spans: list[Span] = []

    @property
    def events(self) -> list[dict[str, Any]]:
        """The spans in Chrome's trace event format, as in ``path``."""
        from scout_hf.trace_files import trace_events

        return trace_events(self.spans)


@contextlib.contextmanager
def record(handle: Any, path: str | os.PathLike[str], steps: int) -> Iterator[Trace]:
    """The body of ``Handle.trace``; see there."""
    from scout_hf.files import check_timeline_path
    from scout_hf.trace_files import write
    from scout_hf.trace_picture import draw

    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps={steps!r} is not allowed: steps takes a whole number from 1 up; try 2")
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"path={path!r} is not allowed: path takes the name of a .json file; try 'step.json'")
    trace = Trace(Path(path))
    check_timeline_path(trace.path, trace.image)
    handle._check_traceable()
    tracer = handle._hooks.tracer = Tracer(handle._family.layers(handle._decoder), steps)
    try:
        yield trace
    finally:
        handle._hooks.tracer = None
        tracer.close()
    trace.spans = tracer.spans()
    if not trace.spans:
        raise ConfigError("nothing was decoded with a ScoutCache inside the block; call generate() inside it")
    write(trace.spans, trace.path)
    config, shape = handle.config, type(handle.model).__name__
    rates = {"link": config.link_gbps, "CPU": config.cpu_gbps}
    emulated = [f"{name} emulated at {rate:g} GB/s" for name, rate in rates.items() if rate is not None]
    draw(trace.spans, trace.image, ", ".join([shape, config.method, *emulated]))
