"""What benchmarks and other tools may look into: this machine's CPUs and memory, what steps did, and how they ran.

>>> from scout_hf.diagnostics import cpu_share_history
>>> with cpu_share_history(handle) as shares:
...     model.generate(**inputs, max_new_tokens=32)
>>> shares[0]  # of layer 0, one number per decode step
"""

from __future__ import annotations

from typing import Any

from scout_hf.compat.cache_names import given_cache
from scout_hf.config import HAND_OVERS
from scout_hf.diagnostics.gpu_time import busy_ms
from scout_hf.diagnostics.reading import MemoryReader
from scout_hf.diagnostics.shares import PARTS, step_shares
from scout_hf.diagnostics.spans import MOVERS, parts_of_spans
from scout_hf.kernels.cpu.library import load_library
from scout_hf.kernels.cpu.topology import cpu_quota, usable_cpus, worker_cpus
from scout_hf.recall_profile import cpu_share_history
from scout_hf.trace import Span, Trace

__all__ = [
    "HAND_OVERS", "MOVERS", "PARTS", "MemoryReader", "Span", "Trace", "busy_ms", "cpu_quota", "cpu_share_history",
    "given_cache", "native_isa", "parts_of_spans", "step_shares", "usable_cpus", "variant_of", "worker_cpus",
]  # fmt: skip


def native_isa() -> str | None:
    """The instruction set that the native library computes with; None where there is no native library.

    >>> native_isa()
    'avx2'
    """
    library = load_library()
    return library.isa if library else None


def variant_of(cache: Any) -> str:
    """What really serves a ScoutCache: the class of its method, what it runs on, and how that hands over to the CPU.

    >>> variant_of(cache)
    'Scout (triton, Flags)'
    """
    return cache.scout_layers[-1].method.variant
