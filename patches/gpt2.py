"""GPT-2."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .base import Family, Part, split_heads
from .quiet import call
from .registry import register_family


class GPT2(Family):
    """Learned positions, fused `c_attn`, layers under `h`."""

    model_types = ("gpt2",)

    def layers(self, decoder: Part) -> Sequence[nn.Module]:
        return decoder.h

    def attention(self, layer: Part) -> nn.Module:
        return layer.attn

    def norm(self, layer: Part, hidden: Tensor) -> Tensor:
        return call(layer, "ln_1", hidden)

    def project(self, attn: Part, x: Tensor) -> Tensor:
        return split_heads(call(attn, "c_attn", x)[..., : attn.split_size], attn.head_dim)

    def project_keys_values(self, attn: Part, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = call(attn, "c_attn", x)[..., attn.split_size :].chunk(2, dim=-1)
        return split_heads(keys, attn.head_dim), split_heads(values, attn.head_dim)

    def rotate(self, decoder, layer, attn, q, position_ids, position_embeddings, hidden) -> Tensor:
        return q


register_family(GPT2())
