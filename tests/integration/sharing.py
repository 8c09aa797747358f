"""Tiny models whose last layers attend over the KV of others, and what else the tests of them share."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.integration.common import ONE_TIER, TWO_TIERS, prompt, run
from tests.patches.tiny import SLIDING_THEN_FULL, missing, tiny_config

FULL = ["full_attention"] * 4
SHARING = {
    "gemma4": ("gemma4_shared", {"num_hidden_layers": 8, "layer_types": SLIDING_THEN_FULL * 2}),
    "gemma4, all full": ("gemma4_shared", {"layer_types": FULL}),
    "gemma3n": (
        "gemma3n",
        {
            "num_hidden_layers": 8,
            "layer_types": SLIDING_THEN_FULL * 2,
            "activation_sparsity_pattern": [0.5, 0.5, *[0.0] * 6],
        },
    ),
}
SHARED = {"gemma4": 4, "gemma4, all full": 2, "gemma3n": 4}
READERS = {"gemma4": [5, 7], "gemma4, all full": [2, 3], "gemma3n": [5, 7]}
"""Full layers that attend over the KV of another one. With all layers full, the first of them is right behind it."""

SETTINGS = {
    "one tier": ONE_TIER,
    "two tiers": TWO_TIERS,
    "two tiers, ahead": TWO_TIERS | {"layer_ahead": True, "cpu_query": "real", "recall": 1},
    "dense": {"method": "dense", "block_size": 8, "window": 8},
}
TIERED = {"block_size": 8, "window": 8, "layer_ahead": False, "digest": "minmax"}


def kinds(*names):
    """The names of models as parameters, those skipped that the installed transformers cannot make."""
    marked = [pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=why)) if (why := missing(SHARING[name][0]))
              else name for name in names or SHARING]  # fmt: skip
    return pytest.mark.parametrize("name", marked)


@functools.cache
def sharing(name: str, dtype: torch.dtype = torch.float32, initializer_range: float = 0.01):
    """The model; all tests of a process have the same one."""
    tiny, overrides = SHARING[name]
    common = {"num_kv_shared_layers": SHARED[name], "initializer_range": initializer_range}
    config = tiny_config(tiny, **common | overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        model.get_input_embeddings().weight.data[0].normal_(std=initializer_range)
    return model.to(dtype).eval()


@functools.cache
def stock(name: str, tokens: int = 50, new: int = 10):
    """What the model answers unpatched."""
    return run(sharing(name), prompt(1, tokens), new)


def full_layers(model) -> list[int]:
    return [index for index, kind in enumerate(model.config.layer_types) if kind == "full_attention"]
