"""The second stage of ``bench gpu``: each hand-over decodes, exactly and sparsely, before anything relies on it.

The pages are large enough to be pinned as those of real models are, and the CPU attends to most of the context. Heads,
groups and blocks are those of the model that is decoded later, so that its kernels are compiled by then.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from transformers import DynamicCache

import scout_hf
from scout_hf import CACHE
from scout_hf.diagnostics import HAND_OVERS, variant_of
from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench.gpu_machine import NO_GPU
from scout_hf.eval.bench.gpu_stages import Given, Job, first_line
from scout_hf.eval.bench.models import make_model

SHAPE = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 1 << 16,
    "tie_word_embeddings": False, "initializer_range": 0.05,
}  # fmt: skip
ROWS, TOKENS, TOKENS_ON_CPU, STEPS = 2, 8192, 512, 12
EXACT = {"budget": None, "cpu_query": "real", "resident": 256}
SPARSE = {"budget": 256, "cpu_query": "predicted", "recall": 1}
TOLERATED = 0.05
"""Of the largest logit's size; weights and KV are bfloat16."""
JOB_SECONDS = 60.0
"""The first one compiles the kernels."""
WAYS = tuple(way for way in HAND_OVERS if way != "auto")


def jobs(given: Given) -> list[Job]:
    """One of each hand-over."""
    place = devices.find(given.settings["device"])
    if place.type == "cpu":
        here = {"join": functools.partial(decode, "join", place, given.settings["seed"], TOKENS_ON_CPU)}
        return [Job(way, here.get(way, lambda: dict(NO_GPU)), JOB_SECONDS) for way in WAYS]
    return [Job(way, functools.partial(decode, way, place, given.settings["seed"]), JOB_SECONDS) for way in WAYS]


def decode(way: str, place: torch.device, seed: int, tokens: int = TOKENS) -> dict[str, Any]:
    """How far logits of exact steps are from stock's; an error if that is too far, or it was another hand-over."""
    model = make_model(SHAPE, None, place, seed)
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(SHAPE["vocab_size"], (ROWS, tokens + STEPS), generator=drawn).to(place)
    split = "auto" if place.type == "cuda" else "cpu"
    expected = _logits(model, DynamicCache(config=model.config), ids)
    apart, ways = 0.0, set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for options in (EXACT, SPARSE):
            with scout_hf.patch(model, hand_over=way, split=split, **options) as handle:
                cache = handle.new_cache()
                found = _logits(model, cache, ids)
                ways.add(variant_of(cache))
            if not bool(found.isfinite().all()):
                raise ArithmeticError(f"logits with {options} are not finite")
            if options is EXACT:
                apart = float((found - expected).abs().max() / expected.abs().max())
    if apart > TOLERATED:
        raise ArithmeticError(f"exact logits are {apart:.1%} of the largest one off; at most {TOLERATED:.0%} may be")
    if lost := [first_line(one.message) for one in caught if "without graphs" in str(one.message)]:
        raise RuntimeError(lost[0])
    if way != "join" and not all("Flags" in one for one in ways):
        raise RuntimeError(f"it ran as {', '.join(sorted(ways))}: the native library or a core for it is missing")
    return {"difference": apart, "facts": sorted(ways)}


@torch.no_grad()
def _logits(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of the last steps, (rows, steps, vocabulary) in float32."""
    model(ids[:, :-STEPS], **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    steps = range(ids.shape[1] - STEPS, ids.shape[1])
    return torch.cat([model(ids[:, at : at + 1], **{CACHE: cache}, use_cache=True).logits for at in steps], 1).float()
