"""What a cell took, beside what it got right."""

from __future__ import annotations

from typing import Any

from scout_hf import Stats


def cost(steps: int, seconds: float, stats: Stats | None) -> dict[str, Any]:
    """Speed, attended share and what the patch counted; ``stats`` is None for the model's own attention."""
    found: dict[str, Any] = {"tokens_per_second": steps / seconds, "attended_share": 1.0}
    if stats is None:
        return found
    found["attended_share"] = stats.attended_tokens / stats.context_tokens
    if stats.cpu_ratio is not None:
        found["cpu_ratio"] = stats.cpu_ratio
    if stats.cosine is not None:
        found["cosine"] = [layer.cosine for layer in stats.layers]
    return found
