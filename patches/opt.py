"""OPT."""

from __future__ import annotations

from torch import Tensor

from .base import Family, Part, split_heads
from .quiet import call
from .registry import register_family


class OPT(Family):
    """No rotary embedding; the query is scaled before it reaches the attention function.

    OPT then passes `scaling=1.0` to the attention function, so `attn.scaling` must not be applied again.
    """

    model_types = ("opt",)

    def norm(self, layer: Part, hidden: Tensor) -> Tensor:
        return call(layer, "self_attn_layer_norm", hidden) if layer.do_layer_norm_before else hidden

    def project(self, attn: Part, x: Tensor) -> Tensor:
        return split_heads(call(attn, "q_proj", x) * attn.scaling, attn.head_dim)

    def rotate(self, decoder, layer, attn, q, position_ids, position_embeddings, hidden) -> Tensor:
        return q


register_family(OPT())
