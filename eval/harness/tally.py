"""What a task cost: decode steps and their time, bytes of KV, share of the context attended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache

from scout_hf import Stats
from scout_hf.diagnostics import given_cache
from scout_hf.eval.caches import kv_bytes


@dataclass
class Tally:
    """Sums over the forward passes of a task.

    Prefill is passes with several tokens per row, padding included; decode is those with one, finished rows and the
    time between the passes included. ``kv_bytes`` are of the largest cache by tier. ``attended`` and ``context`` are
    tokens per decode step, averaged over rows, layers and KV heads, and summed over steps; 0 for stock attention.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    kv_bytes: dict[str, int] = field(default_factory=dict)
    attended: float = 0.0
    context: float = 0.0

    def add(self, other: Tally, at_once: bool = False) -> None:
        """Add another tally; of work in another process at the same time (``at_once``) the longer time counts."""
        for name in ("prefill_tokens", "decode_tokens", "attended", "context"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("prefill_seconds", "decode_seconds"):
            both = getattr(self, name), getattr(other, name)
            setattr(self, name, max(both) if at_once else sum(both))
        self.kv_bytes = max(self.kv_bytes, other.kv_bytes, key=lambda held: sum(held.values()))

    def add_stats(self, stats: Stats) -> None:
        """Add the attended tokens of a patched model."""
        self.attended += stats.attended_tokens * stats.steps
        self.context += stats.context_tokens * stats.steps

    def as_dict(self) -> dict[str, Any]:
        """The sums for JSON; tokens per second (decoded, all rows) and attended share are None without any."""
        return {
            "prefill_tokens": self.prefill_tokens,
            "decode_tokens": self.decode_tokens,
            "prefill_seconds": round(self.prefill_seconds, 4),
            "decode_seconds": round(self.decode_seconds, 4),
            "tokens_per_second": round(self.decode_tokens / self.decode_seconds, 2) if self.decode_seconds else None,
            "kv_bytes": self.kv_bytes,
            "attended_share": round(self.attended / self.context, 5) if self.context else None,
        }


@contextmanager
def measured(model: torch.nn.Module, tally: Tally) -> Iterator[None]:
    """Count and time the forward passes of a model, or of that in a PEFT wrapper, in a tally."""
    # An adapter's generate() calls the model inside.
    model = getattr(model, "get_base_model", lambda: model)()
    watch = _Watch(model, tally)
    hook = model.register_forward_pre_hook(watch.before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        watch.enter(None)


class _Watch:
    """Books time on the phase that it was spent in; a phase begins with its first forward pass."""

    def __init__(self, model: torch.nn.Module, tally: Tally):
        self.device, self.tally = next(model.parameters()).device, tally
        self.phase: str | None = None
        self.since = 0.0
        self.cache: Cache | None = None

    def before(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        cache = given_cache(kwargs)
        if ids is None or cache is None:
            return
        phase = "prefill" if ids.shape[1] > 1 else "decode"
        if phase != self.phase:
            self.enter(phase)
        self.cache = cache
        self._book(f"{phase}_tokens", ids.numel())

    def enter(self, phase: str | None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.phase:
            self._book(f"{self.phase}_seconds", time.perf_counter() - self.since)
        if self.cache is not None and phase != "decode":
            self.tally.add(Tally(kv_bytes=kv_bytes(self.cache)))
            self.cache = None
        self.phase, self.since = phase, time.perf_counter()

    def _book(self, name: str, amount: float) -> None:
        setattr(self.tally, name, getattr(self.tally, name) + amount)
