"""Gemma 4 and Gemma 3n, whose last layers may attend over the keys and values of others."""

from __future__ import annotations

from torch import Tensor

from scout_hf.errors import UnsupportedModelError

from .base import Part, rotary_function, split_heads
from .quiet import call, quiet
from .qwen3 import Qwen3
from .registry import register_family


class Gemma4(Qwen3):
    """Normalises query, keys and values; sliding and full layers differ in rotary frequencies and sizes."""

    model_types: tuple[str, ...] = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")

    def project_keys_values(self, attn: Part, x: Tensor) -> tuple[Tensor, Tensor]:
        if attn.is_kv_shared_layer:
            raise UnsupportedModelError(f"layer {attn.layer_idx} has no keys and values of its own")
        keys = split_heads(call(attn, "k_proj", x), attn.head_dim)
        # Full layers of some sizes have one projection for both.
        values = keys if getattr(attn, "v_proj", None) is None else split_heads(call(attn, "v_proj", x), attn.head_dim)
        return call(attn, "k_norm", keys), call(attn, "v_norm", values)

    def rotate(self, decoder, layer, attn, q, position_ids, position_embeddings, hidden) -> Tensor:
        cos, sin = self.position_embeddings(decoder, attn, hidden, position_ids, position_embeddings)
        return rotary_function(attn)(q, cos, sin)


class Gemma3n(Gemma4):
    """Layers get several hidden states, stacked, and attend with a mixture of them."""

    model_types = ("gemma3n", "gemma3n_text")

    def keys_values(self, decoder, layer, hidden, position_ids=None, position_embeddings=None) -> tuple[Tensor, Tensor]:
        raise UnsupportedModelError(
            f"keys and values of {type(layer).__name__} are not made from one hidden state: keep the real ones"
        )

    def norm(self, layer: Part, hidden: Tensor) -> Tensor:
        altup: Part = quiet(layer.altup, layer)
        return call(layer, "input_layernorm", altup.predict(hidden)[layer.config.altup_active_idx])


register_family(Gemma4())
register_family(Gemma3n())
