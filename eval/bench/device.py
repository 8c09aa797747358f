"""The device that a GPU benchmark runs on: waiting for it, calls in a row, its own rates, and memory that runs out.

Without CUDA the same calls are timed one by one, and what only a GPU has is None.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from scout_hf.eval.bench.gpu_stages import first_line
from scout_hf.eval.bench.timing import Timing, interleave, timed

COPY_BYTES, LINK_BYTES = 1 << 30, 1 << 28
RATE_REPEAT = 10
# Long enough for the start of a graph not to count, short enough for hundreds of shapes.
SAMPLE_SECONDS, MOST_CALLS = 0.02, 256
SPARE_SHARE = 0.9


class Burst(NamedTuple):
    """Calls in a row: ``run`` makes ``calls`` of them and waits; ``graphed`` if the CPU launches them all at once."""

    run: Callable[[], Any]
    calls: int
    graphed: bool


def find(name: str) -> torch.device:
    """The device of that name, with an index. ValueError if torch does not have it."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name} is no device; try cuda, cuda:1 or cpu") from error
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device {name}: allowed are cuda (with a number, such as cuda:1) and cpu; try cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: this torch ({torch.__version__}) sees no GPU; try --device cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0; try cuda:0")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)  # Triton and libraries launch there
    return device


def wait(device: torch.device) -> None:
    """Synchronise with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copies(size: int, device: torch.device) -> int:
    """Of so many bytes, how many must take turns for none to be found in the device's last cache level."""
    return max(1, math.ceil(2 * _cache_bytes(device) / size))


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the device in bytes; None if it is not known."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def too_large(need: int, device: torch.device) -> dict[str, str] | None:
    """``{"skipped": reason}`` if the device has not so many bytes to spare."""
    free = free_bytes(device)
    if free is None or need <= SPARE_SHARE * free:
        return None
    return {"skipped": f"needs {need / 2**30:.1f} GiB of the device, and {free / 2**30:.1f} are free"}


def outcome(call: Callable[[], Any], device: torch.device) -> Any:
    """What ``call()`` gives, or ``{"oom": message}`` if memory ran out, or ``{"failed": message}`` for another error.

    Either way memory is free again then. One of many measurements that fails must not take the others with it.
    """
    try:
        return call()
    except (torch.OutOfMemoryError, MemoryError) as error:  # PinnedMemoryError among them
        kind, message = "oom", first_line(error)
    except Exception as error:
        # The driver's own errors, of pinning among others, have no class.
        kind, message = "oom" if "out of memory" in str(error) else "failed", first_line(error)
    # Only here: the error's frames held what did not fit.
    release(device)
    return {kind: message}


def release(device: torch.device) -> None:
    """Release unused memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def burst(calls: Sequence[Callable[[], Any]], device: torch.device) -> Burst:
    """Calls that take turns, captured in one CUDA graph where that is possible, so that launching costs nothing.

    All have run once then. On a CPU each is made once.
    """
    for call in calls:
        call()
    if device.type != "cuda":
        return Burst(lambda: _all(calls), len(calls), False)
    wait(device)

    def once():
        _all(calls)
        wait(device)

    each = timed(once) / len(calls)
    count = max(len(calls), min(MOST_CALLS, math.ceil(SAMPLE_SECONDS / each)))
    row = list(itertools.islice(itertools.cycle(calls), count))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            _all(row)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # A library that cannot be captured pays for its launches, and the record says so.
        return Burst(lambda: (_all(row), wait(device)), count, False)
    return Burst(lambda: (graph.replay(), wait(device)), count, True)


def time_bursts(bursts: dict[Any, Burst], repeat: int, seed: int = 0) -> dict[Any, Timing]:
    """Times of single calls, each burst so many times, interleaved in random order; every burst runs once before."""
    for one in bursts.values():
        one.run()
    times = interleave({name: lambda one=one: one.run for name, one in bursts.items()}, repeat, seed)
    return {
        name: Timing(tuple(value / bursts[name].calls for value in taken.seconds), taken.preempted)
        for name, taken in times.items()
    }


def copy_rate(device: torch.device) -> dict[str, Any] | None:
    """The device's own rate of copying its memory, bytes read and written together; None without a GPU."""
    return _rate(COPY_BYTES, 2, device, device=device)


def link_rate(device: torch.device, to_host: bool = False) -> dict[str, Any] | None:
    """Copies from pinned host memory to the device, or back; None without a GPU."""
    return _rate(LINK_BYTES, 1, device, to_host, pin_memory=True)


def _rate(size: int, times: int, place: torch.device, back: bool = False, **source: Any) -> dict[str, Any] | None:
    if place.type != "cuda":
        return None
    begin = torch.zeros(size, dtype=torch.uint8, **source)
    target = torch.empty(size, dtype=torch.uint8, device=place)
    begin, target = (target, begin) if back else (begin, target)
    call = burst([lambda: target.copy_(begin, non_blocking=True)], place)
    timing = time_bursts({"copy": call}, RATE_REPEAT)["copy"]
    return {"bytes": times * size, **timing.record(times * size)}


def _cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def _all(calls: Iterable[Callable[[], Any]]) -> None:
    for call in calls:
        call()
