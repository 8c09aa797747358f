"""Decode steps of a model with random weights: one way, one context, one batch."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
from transformers import Cache, LlamaForCausalLM

import scout_hf
from scout_hf.cache_names import CACHE
from scout_hf.eval.bench import drift, llama
from scout_hf.eval.methods.ways import RANDOM, Missing, cache_maker, find
from scout_hf.patches import family_of

SHAPES = {"gqa": {"num_key_value_heads": 8}, "mha": {"num_key_value_heads": 32}}
"""Query heads are 32 of 64 channels, the layer is that of Llama 3.2 1B; the vocabulary is small."""

TURN_TOKENS = 64
CHUNK_TOKENS = 4096
WARM_UPS = 4
FEWEST = 3
SPARE_BYTES = 1 << 30


@dataclass(frozen=True)
class Emulation:
    """Rates of another machine's link and CPU, in GB/s of KV; None for as fast as it goes."""

    link_gbps: float | None = None
    cpu_gbps: float | None = None

    def options(self) -> dict[str, float]:
        """For ``scout_hf.patch``."""
        return {name: value for name, value in vars(self).items() if value is not None}


def make_model(shape: str, layers: int, seed: int) -> LlamaForCausalLM:
    """A model of one of ``SHAPES``."""
    return llama.make_model(seed, num_hidden_layers=layers, vocab_size=1024, **SHAPES[shape])


@torch.no_grad()
def fill(model: LlamaForCausalLM, cache: Cache, rows: int, tokens: int, seed: int = 0) -> None:
    """Keys and values that every layer makes of random inputs, without a forward pass; then a turn of some tokens.

    In that turn every method weighs and chooses what it keeps.
    """
    family, decoder = family_of(model), model.get_decoder()
    random = torch.Generator().manual_seed(seed)
    for index, layer in enumerate(decoder.layers):
        for first in range(0, tokens - TURN_TOKENS, CHUNK_TOKENS):
            count = min(CHUNK_TOKENS, tokens - TURN_TOKENS - first)
            hidden = torch.empty(1, count, model.config.hidden_size, dtype=llama.DTYPE).normal_(generator=random)
            places = torch.arange(first, first + count)[None]
            made = family.keys_values(decoder, layer, hidden, places)
            cache.update(*(part.expand(rows, -1, -1, -1).contiguous() for part in made), index)
            method = getattr(cache.layers[index], "method", None)
            if hasattr(method, "remember"):
                method.remember(hidden.expand(rows, -1, -1).contiguous(), places)
    ids = torch.randint(model.config.vocab_size, (rows, TURN_TOKENS), generator=random)
    model(ids, **{CACHE: cache}, logits_to_keep=1)


def measure(
    model: LlamaForCausalLM,
    way_name: str,
    context: int,
    batch: int,
    budget: int,
    block_size: int,
    emulation: Emulation,
    drift_share: float,
    seconds: float,
    most_steps: int,
) -> dict[str, Any]:
    """Steps of one cell, as a dict for JSON; ``missing`` or ``oom`` where there are none."""
    way = find(way_name, RANDOM)
    need = batch * context * llama.kv_bytes_per_token(model.config)
    if 3.2 * need + SPARE_BYTES > psutil.virtual_memory().available:
        return {"oom": f"{need / 2**30:.1f} GiB of KV, several times in memory"}
    drift.settings_for(drift.correlation_for(drift_share, min(0.5, budget / context)), "torch")
    handle = None
    if way.patched:
        options = way.options | {"block_size": block_size} | (emulation.options() if way.emulated else {})
        handle = scout_hf.patch(model, budget=budget, **options)
    try:
        cache = cache_maker(way, model, handle)()
        begin = time.perf_counter()
        fill(model, cache, batch, context)
        found = {"fill_s": round(time.perf_counter() - begin, 2)}
        return found | _steps(model, cache, handle, batch, seconds, most_steps)
    except Missing as why:
        return {"missing": str(why)}
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def _steps(model, cache, handle, batch: int, seconds: float, most_steps: int) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    taken: list[float] = []

    def step() -> float:
        ids = torch.randint(model.config.vocab_size, (batch, 1), generator=random)
        begin = time.perf_counter()
        model(ids, **{CACHE: cache}, logits_to_keep=1)
        return time.perf_counter() - begin

    first = step()
    for _ in range(min(WARM_UPS, max(1, int(seconds / 2 / first)))):
        step()
    if handle is not None:
        handle.reset_stats()
    begin, cpu = time.perf_counter(), sum(psutil.Process().cpu_times()[:2])
    while len(taken) < FEWEST or (len(taken) < most_steps and time.perf_counter() - begin < seconds):
        taken.append(step())
    cpu = sum(psutil.Process().cpu_times()[:2]) - cpu
    low, middle, high = (1e3 * float(value) for value in np.percentile(taken, (25, 50, 75)))
    found = {"step_ms": middle, "q1_ms": low, "q3_ms": high, "steps": len(taken)}
    found |= {"tokens_per_s": 1e3 * batch / middle, "cpu_ms": 1e3 * cpu / len(taken)}
    return found | told(handle, cache)


def told(handle: scout_hf.Handle | None, cache: Cache) -> dict[str, Any]:
    """What the statistics say of the steps since they began, and what is held."""
    if handle is None:
        parts = [part for layer in cache.layers for part in (layer.keys, layer.values) if part is not None]
        return {"exact": True, "device_bytes": sum(part.nbytes for part in parts), "host_bytes": 0}
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
