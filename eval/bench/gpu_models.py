"""Models in the shape of real ones with random weights, made on their device, and caches filled without a prompt."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel

import scout_hf
from scout_hf.eval.bench import llama

COMMON = {"head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 1 << 20, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": COMMON | {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32,
    },
    "qwen3-14b": COMMON | {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 17408,
        "num_hidden_layers": 40, "num_attention_heads": 40,
    },
}  # fmt: skip

FILL_TOKENS = 4096


def make_model(shape: dict[str, Any], layers: int | None, device: torch.device, seed: int) -> PreTrainedModel:
    """A model of that shape with random weights in bf16, made on its device; not more layers than the shape has."""
    shape = shape | {"num_hidden_layers": min(layers or shape["num_hidden_layers"], shape["num_hidden_layers"])}
    config = AutoConfig.for_model(**shape)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=llama.DTYPE, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads: all, but of embeddings that are not the head too some rows only."""
    size = llama.weight_bytes(model)
    if not model.config.tie_word_embeddings:
        embeddings = model.get_input_embeddings().weight
        size -= embeddings.numel() * embeddings.element_size()
    return size


def fill(cache: Cache, config, batch: int, tokens: int, device: torch.device, seed: int) -> None:
    """Give every layer of an empty cache the same random keys and values, in every row; a ScoutCache in parts."""
    parts = [part.to(device) for part in llama.random_kv(config, min(tokens, FILL_TOKENS), seed)]

    def piece(count: int) -> list[torch.Tensor]:
        repeated = (part.repeat(1, 1, -(-count // part.shape[2]), 1)[:, :, :count] for part in parts)
        return [part.expand(batch, -1, -1, -1) for part in repeated]

    for layer in range(config.num_hidden_layers):
        step = FILL_TOKENS if isinstance(cache, scout_hf.ScoutCache) else tokens
        for first in range(0, tokens, step):
            keys, values = piece(min(step, tokens - first))
            if not first:
                cache.update(keys, values, layer)
            else:
                # Not ``update``, which outside of a patched pass brings everything back to the device.
                method = cache.layers[layer].method
                method.append(keys, values)
                method.flush()


def held_bytes(cache: Cache, device: torch.device) -> dict[str, int]:
    """Bytes of keys and values by where they lie, and of digests."""
    if isinstance(cache, scout_hf.ScoutCache):
        return {"host": 0, "device": 0, "digests": 0} | cache.tier_bytes()
    held = {"host": 0, "device": 0, "digests": 0}
    for layer in cache.layers:
        for part in (layer.keys, layer.values):
            # Without a GPU all of a stock cache counts as the device's.
            held["device" if part.device.type == device.type else "host"] += part.numel() * part.element_size()
    return held
