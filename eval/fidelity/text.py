"""Perplexity of held-out text, every scored token read in a decode step of its own."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch

import scout_hf
from scout_hf.diagnostics import cpu_share_history
from scout_hf.eval.fidelity.cells import Cell
from scout_hf.eval.fidelity.cost import cost
from scout_hf.eval.fidelity.inside import inside
from scout_hf.eval.fidelity.subjects import load_subject
from scout_hf.eval.scoring import score_text

LONGEST = 8192
STRIDE = 4096
ROWS = 8
WATCHED_STEPS = 8


@lru_cache(maxsize=1)
def windows(count: int, steps: int, seed: int) -> torch.Tensor:
    """``count`` pieces of held-out text, (count, LONGEST + steps + 1) token ids.

    Pieces overlap, but what is scored of them, their last ``steps`` tokens, does not. Shorter contexts take the end of
    a piece, so that the tokens that are scored are the same at every length.
    """
    from scout_hf.eval.text import held_out_ids

    length = LONGEST + steps + 1
    stride = max(STRIDE, steps)
    return held_out_ids((count - 1) * stride + length, seed)[0].unfold(0, length, stride)


def read_text(cell: Cell, count: int, steps: int, watched: int, seed: int) -> dict[str, Any]:
    """Mean negative log-likelihood per token of each window, in nats, and the CPU's share by layer and step."""
    if cell.tokens > LONGEST:
        raise ValueError(f"{cell}: texts have {LONGEST} tokens of context at most")
    model, _ = load_subject(cell.model, cell.stress)
    ids = windows(count, steps, seed)[:, LONGEST - cell.tokens :]
    config, losses, shares, ticks = cell.config(), [], [], Ticks()
    with nullcontext() if config is None else scout_hf.patch(model, config) as handle:
        for part in ids.split(ROWS):
            with nullcontext({}) if handle is None else cpu_share_history(handle) as share:
                losses += (-score_text(model, part, cell.tokens + 1, config, ticks.add).mean(1)).tolist()
            ticks.end(len(part))
            shares.append(dict(share))
        stats = handle.stats() if handle else None
    found = {"nll": losses, **cost(ticks.tokens, ticks.seconds, stats)}
    if any(shares):
        found["cpu_ratio_by_step"] = {
            str(layer): [sum(of) / len(of) for of in zip(*(share[layer] for share in shares))]
            for layer in sorted(shares[0])
        }
    few = ids[: min(watched, ROWS), : cell.tokens + 1 + WATCHED_STEPS]
    return found | inside(cell, model, lambda handle: score_text(model, few, cell.tokens + 1, handle.config))


class Ticks:
    """The time between the first and the last decode step of each text; what is before the first one is prefill."""

    def __init__(self):
        self.tokens, self.seconds, self._times = 0, 0.0, []

    def add(self, steps: int) -> None:
        """A decode step is through."""
        self._times.append(time.perf_counter())

    def end(self, rows: int) -> None:
        """A text of so many rows is through."""
        self.tokens += rows * (len(self._times) - 1)
        self.seconds += self._times[-1] - self._times[0]
        self._times.clear()
