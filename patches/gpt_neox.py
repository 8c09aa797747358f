"""GPT-NeoX and Pythia."""

from __future__ import annotations

from torch import Tensor, nn

from .base import Family, Part, split_heads
from .quiet import call
from .registry import register_family


class GPTNeoX(Family):
    """One fused projection, with query, key and value interleaved per head."""

    model_types = ("gpt_neox",)

    def attention(self, layer: Part) -> nn.Module:
        return layer.attention

    def project(self, attn: Part, x: Tensor) -> Tensor:
        return split_heads(call(attn, "query_key_value", x), 3 * attn.head_size)[..., : attn.head_size]

    def project_keys_values(self, attn: Part, x: Tensor) -> tuple[Tensor, Tensor]:
        _, keys, values = split_heads(call(attn, "query_key_value", x), 3 * attn.head_size).chunk(3, dim=-1)
        return keys, values


register_family(GPTNeoX())
