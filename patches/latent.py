"""Latent attention (MLA): DeepSeek V2 and V3, and models that compute their query as these do.

`query` is that of every head, as the model hands it to its attention function. Where the model caches a latent,
`scout_hf.layouts` projects the query into the latent's space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scout_hf.errors import UnsupportedInputError

from .base import Family, Part, rotary_function, split_heads, weight_device
from .quiet import call
from .registry import register_family
from .unpredicted import Unpredicted


class LatentFamily(Family):
    """A query of two projections or one, of whose heads only the last channels are rotated."""

    model_types: tuple[str, ...] = ("deepseek_v3", "axk1", "glm4_moe_lite", "minicpm3", "youtu")

    def available(self, layer: Part) -> bool:
        # Linear layers of hybrid models have a self_attn too.
        return hasattr(layer.self_attn, "kv_b_proj") and super().available(layer)

    def project(self, attn: Part, x: Tensor) -> Tensor:
        if attn.q_lora_rank is None:
            return split_heads(call(attn, "q_proj", x), attn.qk_head_dim)
        low = call(attn, "q_a_layernorm", call(attn, "q_a_proj", x))
        return split_heads(call(attn, "q_b_proj", low), attn.qk_head_dim)

    def rotate(self, decoder, layer, attn, q, position_ids, position_embeddings, hidden) -> Tensor:
        plain, last = q.split([q.shape[-1] - attn.qk_rope_head_dim, attn.qk_rope_head_dim], dim=-1)
        angles = self.position_embeddings(decoder, attn, hidden, position_ids, position_embeddings)
        return torch.cat([plain, self.turn(attn, last, angles)], dim=-1)

    def turn(self, attn: Part, part: Tensor, angles: Any) -> Tensor:
        """Rotate all channels of `part` (batch, heads, length, qk_rope_head_dim)."""
        way = "apply_rotary_pos_emb_interleave" if self.interleaves(attn) else "apply_rotary_pos_emb"
        return rotary_function(attn, way)(part, part[:, :0], *angles)[0]

    def interleaves(self, attn: Part) -> bool:
        """Whether pairs of channels that are rotated together stand side by side."""
        return getattr(attn.config, "rope_interleave", False)

    def keys_values(self, decoder, layer, hidden, position_ids=None, position_embeddings=None) -> tuple[Tensor, Tensor]:
        attn: Part = self.attention(layer)
        self.require_fixed_angles(decoder, attn, position_embeddings)
        hidden = hidden.to(weight_device(attn, default=hidden.device))
        both = call(attn, "kv_a_proj_with_mqa", self.norm(layer, hidden))[:, None]
        latent, last = both.split([attn.kv_lora_rank, attn.qk_rope_head_dim], dim=-1)
        latent = call(attn, "kv_a_layernorm", latent)
        last = self.rotate(decoder, layer, attn, last, position_ids, position_embeddings, hidden)
        if hasattr(attn, "expand_kv"):
            return latent, last
        # Before transformers 5.17 the expanded keys and values were cached.
        heads = split_heads(call(attn, "kv_b_proj", latent[:, 0]), attn.qk_nope_head_dim + attn.v_head_dim)
        keys, values = heads.split([attn.qk_nope_head_dim, attn.v_head_dim], dim=-1)
        return torch.cat([keys, last.expand(*keys.shape[:-1], -1)], dim=-1), values


class DeepseekV2(LatentFamily):
    """Rotates by complex numbers, one tensor of angles."""

    model_types = ("deepseek_v2",)

    def turn(self, attn: Part, part: Tensor, angles: Any) -> Tensor:
        return rotary_function(attn, "apply_rotary_emb")(part, part[:, :1], angles)[0]


class BailingHybrid(LatentFamily):
    """Always interleaved, whatever the config says."""

    model_types = ("bailing_hybrid",)

    def interleaves(self, attn: Part) -> bool:
        return True


class KimiLinear(LatentFamily):
    """Without a rotary embedding."""

    model_types = ("kimi_linear",)

    def rotate(self, decoder, layer, attn, q, position_ids, position_embeddings, hidden) -> Tensor:
        return q


class Mistral4(LatentFamily):
    """Scales the query by its position, as Llama4 does."""

    model_types = ("mistral4",)

    def query(self, decoder, layer, hidden, position_ids=None, position_embeddings=None) -> Tensor:
        query = super().query(decoder, layer, hidden, position_ids, position_embeddings)
        if position_ids is None:
            raise UnsupportedInputError("the query is scaled by position: pass the position_ids of the forward pass")
        attn: Part = self.attention(layer)
        rope, scale_of = attn.config.rope_parameters, rotary_function(attn, "get_llama_4_attn_scale")
        scale = scale_of(
            position_ids.to(query.device),
            rope.get("llama_4_scaling_beta"),
            rope.get("original_max_position_embeddings"),
        )
        return query * scale.to(query.dtype)


class LongcatFlash(Unpredicted):
    """Two attentions in each decoder layer, which are the layers of the cache. Their queries are not predicted."""

    model_types = ("longcat_flash",)

    def layers(self, decoder: Part) -> Sequence[nn.Module]:
        return [attn for layer in decoder.layers for attn in layer.self_attn]

    def attention(self, layer: Part) -> nn.Module:
        return layer


register_family(LatentFamily())
register_family(DeepseekV2())
register_family(BailingHybrid())
register_family(KimiLinear())
register_family(Mistral4())
register_family(LongcatFlash())
