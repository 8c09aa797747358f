"""Phi3: one fused projection for query, key and value."""

from __future__ import annotations

from torch import Tensor

from .base import Family, Part, split_heads
from .quiet import call
from .registry import register_family


class Phi3(Family):
    """The query is the first columns of `qkv_proj`; partial rotary is up to the model's rotary function."""

    model_types = ("phi3",)

    def project(self, attn: Part, x: Tensor) -> Tensor:
        width = attn.config.num_attention_heads * attn.head_dim
        return split_heads(call(attn, "qkv_proj", x)[..., :width], attn.head_dim)

    def project_keys_values(self, attn: Part, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = call(attn, "qkv_proj", x)[..., attn.config.num_attention_heads * attn.head_dim :].chunk(
            2, dim=-1
        )
        return split_heads(keys, attn.head_dim), split_heads(values, attn.head_dim)


register_family(Phi3())
