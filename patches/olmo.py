"""OLMo 2 and 3: no norm before attention, but one over the full width of the query."""

from __future__ import annotations

from torch import Tensor

from .base import Family, Part, split_heads
from .quiet import call
from .registry import register_family


class Olmo2(Family):
    """The residual stream enters `q_proj` without a norm; `q_norm` runs before the split into heads."""

    model_types: tuple[str, ...] = ("olmo2", "olmo3")

    def norm(self, layer: Part, hidden: Tensor) -> Tensor:
        return hidden

    def project(self, attn: Part, x: Tensor) -> Tensor:
        return split_heads(call(attn, "q_norm", call(attn, "q_proj", x)), attn.head_dim)

    def project_keys_values(self, attn: Part, x: Tensor) -> tuple[Tensor, Tensor]:
        keys = split_heads(call(attn, "k_norm", call(attn, "k_proj", x)), attn.head_dim)
        return keys, split_heads(call(attn, "v_proj", x), attn.head_dim)


register_family(Olmo2())
