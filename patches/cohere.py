"""Cohere (Command R) and Cohere2 (Command R7B)."""

from __future__ import annotations

from torch import Tensor

from .base import Family, Part
from .quiet import call
from .registry import register_family


class Cohere(Family):
    """Optional `q_norm` with a weight (heads, head_dim), applied before the transpose."""

    model_types = ("cohere",)

    def project(self, attn: Part, x: Tensor) -> Tensor:
        q = call(attn, "q_proj", x).view(*x.shape[:-1], -1, attn.head_dim)
        if attn.use_qk_norm:
            q = call(attn, "q_norm", q)
        return q.transpose(1, 2)

    def project_keys_values(self, attn: Part, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().project_keys_values(attn, x)
        if attn.use_qk_norm:
            keys = call(attn, "k_norm", keys.transpose(1, 2)).transpose(1, 2)
        return keys, values


class Cohere2(Family):
    """Only the sliding-window layers have a rotary embedding."""

    model_types = ("cohere2",)

    def rotate(self, decoder, layer, attn, q, position_ids, position_embeddings, hidden) -> Tensor:
        if attn.sliding_window is None:
            return q
        return super().rotate(decoder, layer, attn, q, position_ids, position_embeddings, hidden)


register_family(Cohere())
register_family(Cohere2())
