"""Measurements for benchmarks and other tools: the CPUs and memory of this machine, and what decode steps did.

>>> from scout_hf.diagnostics import cpu_share_history
>>> with cpu_share_history(handle) as shares:
...     tokens = model.generate(**inputs, max_new_tokens=32)
>>> shares[0]  # layer 0, one number per decode step
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
    """The instruction set that the native library uses.

    Returns
    -------
    str or None
        None without a native library.

    Examples
    --------
    >>> native_isa()
    'avx2'
    """
    library = load_library()
    return library.isa if library else None


def variant_of(cache: Any) -> str:
    """The implementation that a ScoutCache uses: its method's class, the kernels, and how GPU and CPU synchronise.

    Parameters
    ----------
    cache : ScoutCache
        With tokens.

    Returns
    -------
    str

    Examples
    --------
    >>> variant_of(cache)
    'OneTierScout'
    """
    return cache.scout_layers[-1].method.variant
