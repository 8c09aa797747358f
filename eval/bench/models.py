"""Models in the shape of real ones with random weights, for speed only; and the fastest stock attention on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)  # fmt: skip
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from scout_hf.eval.caches import DTYPE, tensor_bytes

FOLDED = "folded_sdpa"
# Of Llama 3.2 1B.
SHAPE = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 1 << 20,
    "tie_word_embeddings": True,
}  # fmt: skip
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
HEAD = "lm_head.weight"
WEIGHT_DEVIATION = 0.02


def make_model(shape: dict[str, Any], layers: int | None, device: torch.device, seed: int) -> PreTrainedModel:
    """A model of that shape with random weights in bf16, made on its device; not more layers than the shape has."""
    shape = shape | {"num_hidden_layers": min(layers or shape["num_hidden_layers"], shape["num_hidden_layers"])}
    config = AutoConfig.for_model(**shape)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def make_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A model in the shape of Llama 3.2 1B, or in one that ``changes`` some of it, with weights drawn from ``seed``."""
    model = _without_weights(LlamaConfig(**SHAPE | changes))
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in model.state_dict().items():
        if name != HEAD:  # tied to the embeddings
            made = torch.empty(weight.shape, dtype=DTYPE)
            weights[name] = made.fill_(1) if "norm" in name else made.normal_(0, WEIGHT_DEVIATION, generator=random)
    return _with(model, weights)


def twin(model: LlamaForCausalLM, layers: int | None = None) -> LlamaForCausalLM:
    """Another model over the same memory, perhaps with only so many of the layers."""
    shape = {name: getattr(model.config, name) for name in SHAPE}
    made = _without_weights(LlamaConfig(**shape | ({"num_hidden_layers": layers} if layers else {})))
    weights, known = model.state_dict(), made.state_dict()
    return _with(made, {name: weight for name, weight in weights.items() if name in known and name != HEAD})


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that a decode step reads: all, but of embeddings that are not the head too some rows only."""
    size = tensor_bytes(list(model.parameters()))
    tied = model.config.tie_word_embeddings
    return size if tied else size - tensor_bytes(model.get_input_embeddings().weight)


def folded_sdpa(module, query, key, value, attention_mask, **kwargs):
    """The fastest stock attention on a CPU: the heads of a GQA group become queries, so keys are read once."""
    if query.shape[2] != 1 or attention_mask is not None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    batch, heads, _, dim = query.shape
    folded = query.view(batch, key.shape[1], -1, dim)
    out = torch.nn.functional.scaled_dot_product_attention(folded, key, value, scale=kwargs.get("scaling"))
    return out.reshape(batch, 1, heads, dim), None


@contextmanager
def folded(model: PreTrainedModel) -> Iterator[None]:
    """The model attends by :func:`folded_sdpa` meanwhile."""
    if FOLDED not in AttentionInterface._global_mapping:
        AttentionInterface.register(FOLDED, folded_sdpa)
        AttentionMaskInterface.register(FOLDED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    model.config._attn_implementation = FOLDED
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _without_weights(config: LlamaConfig) -> LlamaForCausalLM:
    config._attn_implementation = "sdpa"
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
