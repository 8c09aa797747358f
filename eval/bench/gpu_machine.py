"""The first stage of ``bench gpu``: what is there, and how fast the machine itself is."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from scout_hf.diagnostics import usable_cpus
from scout_hf.eval.bench import bandwidth, machine
from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench.gpu_stages import Given, Job
from scout_hf.eval.bench.timing import timed
from scout_hf.stores import allocate_slab

LIBRARIES = ("triton", "accelerate", "flashinfer-python", "flash-attn", "pytest", "psutil")
PINNED_BYTES, MATRIX, READ_REPEAT = 4 << 30, 8192, 3
NO_GPU = {"skipped": "needs a GPU"}
HOST_POINTERS = 91
"""Number of the driver's attribute: kernels may use the host's own address of registered memory."""


def jobs(given: Given) -> list[Job]:
    """Versions, and the rates of copies, link, matrix products, host memory and pinning."""
    place = devices.find(given.settings["device"])
    on_gpu: dict[str, Callable[[torch.device], dict[str, Any]]] = {
        "copies on the GPU": devices.copy_rate,
        "link, to the GPU": devices.link_rate,
        "link, to the host": functools.partial(devices.link_rate, to_host=True),
        "matrix product, bf16": matrix_rate,
        "pinning memory": pinning_rate,
    }
    rates = [
        Job(name, (lambda rate=rate: rate(place)) if place.type == "cuda" else lambda: dict(NO_GPU), 30)
        for name, rate in on_gpu.items()
    ]
    return [Job("versions", lambda: versions(place), 30), *rates, Job("reads of host memory", read_rate, 30)]


def versions(place: torch.device) -> dict[str, Any]:
    """Hardware and versions; what stands in the way is among ``warnings``."""
    facts = machine.describe() | {name: _version(name) for name in LIBRARIES}
    warnings = []
    if facts["isa"] is None:
        warnings.append("no native library, so no flags and no graph: python setup.py build_ext --inplace")
    if place.type == "cuda":
        found = torch.cuda.get_device_properties(place)
        facts |= {
            "gpu": found.name,
            "gpu_memory_gib": round(found.total_memory / 2**30, 1),
            "gpu_free_gib": round(torch.cuda.mem_get_info(place)[0] / 2**30, 1),
            "multiprocessors": found.multi_processor_count,
            "capability": f"{found.major}.{found.minor}",
            "cuda": torch.version.cuda or torch.version.hip,
            "host_pointers": host_pointers(place),
        }
        if not facts["host_pointers"]:
            warnings.append("kernels may not use host addresses of pinned memory, or the driver does not say")
    memory = psutil.virtual_memory()
    facts |= {"memory_free_gib": round(memory.available / 2**30, 1), "memory_limit_gib": memory_limit_gib()}
    free = f"{facts['memory_free_gib']} of {facts['memory_gib']} GiB free"
    seen = [f"{facts['cpus']} CPUs", str(facts["isa"]), free]
    return {"machine": facts, "facts": seen, "warnings": warnings}


def memory_limit_gib() -> float | None:
    """What the control group of this process may take, in GiB; None without a limit."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(name).read_text().strip() if os.path.exists(name) else "max"
        if text != "max" and int(text) < psutil.virtual_memory().total:
            return round(int(text) / 2**30, 1)
    return None


def host_pointers(place: torch.device) -> bool | None:
    """Whether kernels may use the host's own address of registered memory; None if the driver is not found."""
    value = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    torch.zeros(1, dtype=torch.float32, device=place)
    failed = driver.cuDeviceGetAttribute(ctypes.byref(value), HOST_POINTERS, place.index)
    return None if failed else bool(value.value)


def matrix_rate(place: torch.device) -> dict[str, Any]:
    """A product of two square matrices in bf16."""
    left, right = torch.randn((2, MATRIX, MATRIX), dtype=torch.bfloat16, device=place)
    out = torch.empty_like(left)
    call = devices.burst([lambda: torch.mm(left, right, out=out)], place)
    timing = devices.time_bursts({"mm": call}, devices.RATE_REPEAT)["mm"]
    return timing.record() | {"tflop_per_s": 2 * MATRIX**3 / timing.median / 1e12}


def pinning_rate(place: torch.device) -> dict[str, Any]:
    """Allocating and pinning host memory as caches do."""
    seconds = timed(lambda: allocate_slab((PINNED_BYTES,), torch.uint8, torch.device("cpu"), pinned=True))
    return {"gb_per_s": PINNED_BYTES / seconds / 1e9, "pinned_gib": PINNED_BYTES / 2**30}


def read_rate() -> dict[str, Any]:
    """Sequential reads of host memory on all CPUs."""
    return bandwidth.read_rate(len(usable_cpus()), READ_REPEAT)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
