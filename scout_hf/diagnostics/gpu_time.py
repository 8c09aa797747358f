"""How long a GPU works in a decode step, from a trace of torch's profiler."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# A kernel that only polls for the CPU's word is no work.
POLLING = ("_wait",)


def busy_ms(step: Callable[[], Any], steps: int, device: torch.device) -> dict[str, float] | None:
    """Milliseconds per step in which some kernel runs on the device, and in which one only waits for the CPU.

    ``busy`` leaves waiting out. None without a GPU. Kernels take as long under the profiler as without, but a step
    takes longer: hold these against the time of a step that was not traced.
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
    """Name, begin and end in microseconds of every kernel of a trace; copies and fills are none."""
    for event in json.loads(path.read_text())["traceEvents"]:
        if event.get("cat") == "kernel":
            yield event["name"], float(event["ts"]), float(event["ts"]) + float(event["dur"])


def union(spans: Iterable[Iterable[float]]) -> float:
    """Length of what all spans cover together; streams overlap."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(map(tuple, spans)):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total
