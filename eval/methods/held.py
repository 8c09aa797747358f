"""What a cache holds, and where; what scout_hf counted of the steps."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache, QuantizedCache

import scout_hf


def told(handle: scout_hf.Handle | None, cache: Cache) -> dict[str, Any]:
    """What the statistics say of the steps since they began, and what is held."""
    if handle is None:
        total = tensor_bytes([vars(layer) for layer in cache.layers])
        host = getattr(cache, "offloading", False)
        found = {"exact": not isinstance(cache, QuantizedCache), "device_bytes": 0 if host else total}
        # What is offloaded crosses in every step.
        return found | {"host_bytes": total if host else 0} | ({"link_bytes": float(total)} if host else {})
    stats, held = handle.stats(), cache.tier_bytes()
    one_tier = "device" not in held
    return {
        "exact": stats.exact,
        "attended_tokens": stats.attended_tokens,
        "device_bytes": held.get("digests", 0) + (held["host"] if one_tier else held["device"]),
        "host_bytes": 0 if one_tier else held["host"],
        "link_bytes": stats.recalled_bytes / max(1, stats.steps),
        "join_ms": stats.join_wait_ms,
        "cpu_ratio": stats.cpu_ratio,
        "notes": list(stats.notes),
    }


def tensor_bytes(parts: Any) -> int:
    """Of every tensor in lists, tuples and dicts; of a tensor that is made of others, those."""
    if isinstance(parts, dict):
        return sum(map(tensor_bytes, parts.values()))
    if isinstance(parts, (list, tuple)):
        return sum(map(tensor_bytes, parts))
    if not isinstance(parts, torch.Tensor):
        return 0
    if hasattr(parts, "__tensor_flatten__"):
        return tensor_bytes([getattr(parts, name) for name in parts.__tensor_flatten__()[0]])
    return parts.numel() * parts.element_size()
