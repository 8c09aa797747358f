"""A model in the shape of Llama 3.2 1B with random weights, and caches of random keys: for speed alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, Cache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

DTYPE = torch.bfloat16
FOLDED = "folded_sdpa"
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 1 << 20,
    "tie_word_embeddings": True,
}
HEAD = "lm_head.weight"
WEIGHT_DEVIATION = 0.02


def folded_sdpa(module, query, key, value, attention_mask, **kwargs):
    """Stock attention at its best on a CPU: the heads of a GQA group become queries, so that keys are read once."""
    if query.shape[2] != 1 or attention_mask is not None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    batch, heads, _, dim = query.shape
    folded = query.view(batch, key.shape[1], -1, dim)
    out = torch.nn.functional.scaled_dot_product_attention(folded, key, value, scale=kwargs.get("scaling"))
    return out.reshape(batch, 1, heads, dim), None


def make_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A model in that shape, or in one that ``changes`` some of it, with weights drawn from ``seed``."""
    model = _without_weights(LlamaConfig(**SHAPE | changes))
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in model.state_dict().items():
        if name != HEAD:  # tied to the embeddings
            made = torch.empty(weight.shape, dtype=DTYPE)
            weights[name] = made.fill_(1) if "norm" in name else made.normal_(0, WEIGHT_DEVIATION, generator=random)
    return _with(model, weights)


def twin(model: LlamaForCausalLM, attention: str | None = None, layers: int | None = None) -> LlamaForCausalLM:
    """Another model over the same memory, with another attention implementation or only so many of the layers."""
    shape = {name: getattr(model.config, name) for name in SHAPE}
    made = _without_weights(LlamaConfig(**shape | ({"num_hidden_layers": layers} if layers else {})), attention)
    weights, known = model.state_dict(), made.state_dict()
    return _with(made, {name: weight for name, weight in weights.items() if name in known and name != HEAD})


def fill(cache: Cache, config: LlamaConfig, tokens: int, seed: int = 0) -> Cache:
    """Give every layer of an empty cache the same ``tokens`` random keys and values; returns the cache."""
    keys, values = random_kv(config, tokens, seed)
    with torch.no_grad():
        for layer in range(config.num_hidden_layers):
            cache.update(keys, values, layer)
    return cache


def random_kv(config: LlamaConfig, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one layer, (1, kv_heads, tokens, head_dim) each."""
    random = torch.Generator().manual_seed(seed)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    keys, values = (torch.empty(shape, dtype=DTYPE).normal_(generator=random) for _ in range(2))
    return keys, values


def kv_bytes_per_token(config: LlamaConfig) -> int:
    """Of all layers, in bf16."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * DTYPE.itemsize


def weight_bytes(model: LlamaForCausalLM) -> int:
    """Bytes of weights that a decode step reads: all; of the embeddings it reads one row, but the head is the same."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


@contextmanager
def folded(model: PreTrainedModel) -> Iterator[None]:
    """The model attends by :func:`folded_sdpa` meanwhile."""
    _register_folded()
    before = model.config._attn_implementation
    model.config._attn_implementation = FOLDED
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _register_folded() -> None:
    if FOLDED not in AttentionInterface._global_mapping:
        AttentionInterface.register(FOLDED, folded_sdpa)
        AttentionMaskInterface.register(FOLDED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _without_weights(config: LlamaConfig, attention: str | None = None) -> LlamaForCausalLM:
    _register_folded()
    config._attn_implementation = attention or "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(DTYPE)
    return model.eval()


def _with(model: LlamaForCausalLM, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    # Its frequencies are no weights, and were never computed.
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    left = [name for name, part in [*model.named_parameters(), *model.named_buffers()] if part.is_meta]
    if left:
        raise RuntimeError(f"{left} of the benchmark's model got no values")
    return model.requires_grad_(False)
