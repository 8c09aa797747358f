"""SmolLM3."""

from __future__ import annotations

from torch import Tensor

from .base import Family
from .registry import register_family


class SmolLM3(Family):
    """Llama, but every n-th layer has no rotary embedding."""

    model_types = ("smollm3",)

    def rotate(self, decoder, layer, attn, q, position_ids, position_embeddings, hidden) -> Tensor:
        if not attn.use_rope:
            return q
        return super().rotate(decoder, layer, attn, q, position_ids, position_embeddings, hidden)


register_family(SmolLM3())
