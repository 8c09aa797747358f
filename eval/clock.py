"""A streamer that notes when tokens come."""

from __future__ import annotations

import time

import torch
from transformers.generation.streamers import BaseStreamer


class Clock(BaseStreamer):
    """Notes when the prompt and each token came, in ``times``."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""

    def per_second(self, skipped: int) -> float:
        """Tokens per second, without the prompt and the first ``skipped`` tokens."""
        times = self.times[1 + skipped :]
        return (len(times) - 1) / (times[-1] - times[0])
