"""Qwen3 and others that normalise every head of query and keys before the rotary embedding."""

from __future__ import annotations

from torch import Tensor

from .base import Family, Part, split_heads
from .quiet import call
from .registry import register_family


class Qwen3(Family):
    """Llama with `q_norm` and `k_norm` over head_dim."""

    model_types: tuple[str, ...] = ("qwen3", "qwen3_moe")

    def project(self, attn: Part, x: Tensor) -> Tensor:
        return call(attn, "q_norm", split_heads(call(attn, "q_proj", x), attn.head_dim))

    def project_keys_values(self, attn: Part, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().project_keys_values(attn, x)
        return call(attn, "k_norm", keys), values


class Apertus(Qwen3):
    """Qwen3 under another name for the norm."""

    model_types = ("apertus",)

    def norm(self, layer: Part, hidden: Tensor) -> Tensor:
        return call(layer, "attention_layernorm", hidden)


class Qwen3Next(Qwen3):
    """Qwen3-Next and Qwen3.5: `q_proj` also computes the output gate, next to the query in every head.

    The layers with linear attention have no `self_attn`, so `available` is False for them.
    """

    model_types = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")

    def project(self, attn: Part, x: Tensor) -> Tensor:
        query_and_gate = call(attn, "q_proj", x).view(*x.shape[:-1], -1, 2 * attn.head_dim)
        return call(attn, "q_norm", query_and_gate[..., : attn.head_dim]).transpose(1, 2)


register_family(Qwen3())
register_family(Apertus())
register_family(Qwen3Next())
