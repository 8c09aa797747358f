"""Phi and StableLM: the attention module rotates only the leading channels of every head."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Family, Part, rotary_function, split_heads
from .quiet import call
from .registry import register_family


class Phi(Family):
    """Optional `q_layernorm` per head, then a rotary embedding on the first `rotary_ndims` channels."""

    model_types = ("phi", "stablelm")

    def project(self, attn: Part, x: Tensor) -> Tensor:
        q = split_heads(call(attn, "q_proj", x), attn.head_dim)
        return call(attn, "q_layernorm", q) if attn.qk_layernorm else q

    def project_keys_values(self, attn: Part, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().project_keys_values(attn, x)
        return (call(attn, "k_layernorm", keys) if attn.qk_layernorm else keys), values

    def rotate(self, decoder, layer, attn, q, position_ids, position_embeddings, hidden) -> Tensor:
        cos, sin = self.position_embeddings(decoder, attn, hidden, position_ids, position_embeddings)
        turned, kept = q[..., : attn.rotary_ndims], q[..., attn.rotary_ndims :]
        turned = rotary_function(attn)(turned, turned[:, :0], cos, sin)[0]
        return torch.cat((turned, kept), dim=-1)


register_family(Phi())
