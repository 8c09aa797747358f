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
    """Sums over the passes of a task; a step with several rows makes a token for each.

    Prefill: passes with several tokens per row, padding included. Decode: one-token passes, rows that are done
    included, with all that goes on between them. Bytes: of the largest cache, by tier; all of a stock cache is
    ``stock``. Attended and context: sums over decode steps of means over rows, layers and KV heads; equal for stock
    attention.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    kv_bytes: dict[str, int] = field(default_factory=dict)
    attended: float = 0.0
    context: float = 0.0

    def add(self, other: Tally, at_once: bool = False) -> None:
        """Take in another tally, of work that was done after this or, on another process, ``at_once``."""
        for name in ("prefill_tokens", "decode_tokens", "attended", "context"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("prefill_seconds", "decode_seconds"):
            both = getattr(self, name), getattr(other, name)
            setattr(self, name, max(both) if at_once else sum(both))
        self.kv_bytes = max(self.kv_bytes, other.kv_bytes, key=lambda held: sum(held.values()))

    def add_stats(self, stats: Stats) -> None:
        """Take in what a patched model attended."""
        self.attended += stats.attended_tokens * stats.steps
        self.context += stats.context_tokens * stats.steps

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with decoded tokens of all rows per second and the attended share; None where there was nothing."""
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
    """Watch the passes of a model inside the block: prefills, and the decode steps after each."""
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
