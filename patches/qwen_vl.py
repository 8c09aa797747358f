"""Qwen's vision-language decoders: the decoder's rotary angles already include the three position axes."""

from __future__ import annotations

import sys

from torch import Tensor

from .llama import Llama
from .qwen3 import Qwen3
from .registry import register_family


class Qwen2VL(Llama):
    """Llama; older releases of transformers mix the position axes in the rotary function."""

    model_types = ("qwen2_vl_text", "qwen2_5_vl_text")

    def rotate(self, decoder, layer, attn, q, position_ids, position_embeddings, hidden) -> Tensor:
        mixing = getattr(sys.modules[type(attn).__module__], "apply_multimodal_rotary_pos_emb", None)
        if mixing is None:
            return super().rotate(decoder, layer, attn, q, position_ids, position_embeddings, hidden)
        cos, sin = self.position_embeddings(decoder, attn, hidden, position_ids, position_embeddings)
        return mixing(q, q[:, :0], cos, sin, attn.config.rope_parameters["mrope_section"])[0]


class Qwen3VL(Qwen3):
    """Qwen3; images are also added to the hidden states after some layers, in the prompt only."""

    model_types = ("qwen3_vl_text", "qwen3_vl_moe_text")


register_family(Qwen2VL())
register_family(Qwen3VL())
