"""How long a GPU computes in a decode step, measured with torch's profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Kernels that only wait for a flag of the CPU.
POLLING = ("_wait",)


def busy_ms(step: Callable[[], Any], steps: int, device: torch.device) -> dict[str, float] | None:
    """Milliseconds per step in which the GPU computes, and in which its kernels only wait for the CPU.

    Parameters
    ----------
    step : callable
        Runs one decode step.
    steps : int
        How many to run.
    device : torch.device
        That the steps run on.

    Returns
    -------
    dict or None
        ``busy``: at least one kernel computes; ``waiting``: all running kernels wait for the CPU. None without a GPU
        and if no kernel ran.

    Notes
    -----
    The profiler slows down steps, not kernels: compare these times with the time of a step without the profiler.

    Examples
    --------
    >>> busy_ms(lambda: model(ids, use_cache=False), steps=2, device=torch.device("cpu")) is None
    True
    """
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as tracer:
        for _ in range(steps):
            step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        tracer.export_chrome_trace(str(path))
        kernels = list(kernels_of(path))
    if not kernels:
        return None
    working = [span for name, *span in kernels if name not in POLLING]
    every = [span for _, *span in kernels]
    busy = union(working)
    return {"busy": busy / steps / 1e3, "waiting": (union(every) - busy) / steps / 1e3}


def kernels_of(path: Path) -> Iterable[tuple[str, float, float]]:
    """Name, begin and end in microseconds of every kernel in a trace, without copies and memsets."""
    for event in json.loads(path.read_text())["traceEvents"]:
        if event.get("cat") == "kernel":
            yield event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"])


def union(spans: Iterable[Iterable[float]]) -> float:
    """Length of the union of all spans, which overlap if they are from several streams."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(map(tuple, spans)):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total
