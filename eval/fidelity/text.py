"""Perplexity of held-out text, every scored token read in a decode step of its own."""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

import scout_hf
from scout_hf.eval.decode_path import prefill
from scout_hf.eval.fidelity.cells import Cell
from scout_hf.eval.fidelity.cost import cost
from scout_hf.eval.fidelity.subjects import load_subject
from scout_hf.profiling import cpu_share_history

LONGEST = 8192
ROWS = 8


@lru_cache(maxsize=1)
def windows(count: int, steps: int, seed: int) -> torch.Tensor:
    """``count`` pieces of held-out text that do not overlap, (count, LONGEST + steps + 1) token ids.

    Shorter contexts take their end, so that the tokens that are scored are the same at every length.
    """
    from scout_hf.eval.text import held_out_ids

    length = LONGEST + steps + 1
    return held_out_ids(count * length, seed).view(count, length)


def score_text(cell: Cell, count: int, steps: int, seed: int) -> dict[str, Any]:
    """Mean negative log-likelihood per token of each window, in nats, and the CPU's share over the steps by layer."""
    if cell.tokens > LONGEST:
        raise ValueError(f"{cell}: texts have {LONGEST} tokens of context at most")
    model, _ = load_subject(cell.model, cell.stress)
    ids = windows(count, steps, seed)[:, LONGEST - cell.tokens :]
    config, losses, seconds, shares = cell.config(), [], 0.0, []
    with nullcontext() if config is None else scout_hf.patch(model, config) as handle:
        for part in ids.split(ROWS):
            cache = handle.new_cache() if handle else DynamicCache(config=model.config)
            prefill(model, cache, part[:, : cell.tokens])
            with nullcontext({}) if handle is None else cpu_share_history(handle) as share:
                begin = time.perf_counter()
                losses += stepwise_loss(model, cache, part[:, cell.tokens :]).mean(1).tolist()
                seconds += time.perf_counter() - begin
            shares.append(dict(share))
        stats = handle.stats() if handle else None
    found = {"nll": losses, **cost(count * steps, seconds, stats)}
    if any(shares):
        layers = sorted(shares[0])
        found["cpu_ratio_by_step"] = {
            str(layer): [sum(of) / len(of) for of in zip(*(share[layer] for share in shares))] for layer in layers
        }
    return found


@torch.no_grad()
def stepwise_loss(model: PreTrainedModel, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
    """Loss of all but the first of ``ids`` (rows, n + 1) that follow what ``cache`` holds, (rows, n) in nats."""
    losses = []
    for place in range(ids.shape[1] - 1):
        logits = model(ids[:, place : place + 1], past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[:, place + 1], reduction="none"))
    return torch.stack(losses, dim=1)
