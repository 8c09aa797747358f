"""Models of which some layers have linear attention, a state space or a convolution, and others full attention.

`available` is False for the layers without attention, which keep their stock cache.
"""

from __future__ import annotations

from torch import Tensor, nn

from .base import Family, Part, split_heads
from .olmo import Olmo2
from .quiet import call
from .qwen3 import Qwen3
from .registry import register_family


class Hybrid(Family):
    """Bamba: as Llama where there is attention."""

    model_types: tuple[str, ...] = ("bamba",)

    def attention(self, layer: Part) -> nn.Module:
        # Granite has the name in every layer.
        if getattr(layer, "self_attn", None) is None:
            raise AttributeError(f"{type(layer).__name__} has no attention")
        return layer.self_attn


class GraniteHybrid(Hybrid):
    """Granite 4: a rotary embedding in some models, none in others."""

    model_types = ("granitemoehybrid",)

    def rotate(self, decoder, layer, attn, q, position_ids, position_embeddings, hidden) -> Tensor:
        if decoder.rotary_emb is None:
            return q
        return super().rotate(decoder, layer, attn, q, position_ids, position_embeddings, hidden)


class Jamba(Hybrid):
    """No positions at all: the state-space layers tell the order."""

    model_types = ("jamba",)

    def rotate(self, decoder, layer, attn, q, position_ids, position_embeddings, hidden) -> Tensor:
        return q


class NemotronH(Jamba):
    """Every layer is one mixer behind one norm: attention, a state space, an MLP or experts."""

    model_types = ("nemotron_h",)

    def attention(self, layer: Part) -> nn.Module:
        if not hasattr(layer.mixer, "q_proj"):
            raise AttributeError(f"{type(layer.mixer).__name__} is no attention")
        return layer.mixer

    def norm(self, layer: Part, hidden: Tensor) -> Tensor:
        return call(layer, "norm", hidden.to(layer.norm.weight.dtype))


class FalconH1(Hybrid):
    """Attention and a state space side by side in every layer; what enters attention, and keys, are scaled."""

    model_types = ("falcon_h1",)

    def norm(self, layer: Part, hidden: Tensor) -> Tensor:
        return super().norm(layer, hidden) * layer.attention_in_multiplier

    def project_keys_values(self, attn: Part, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().project_keys_values(attn, x)
        return keys * attn.key_multiplier, values


class Lfm2(Hybrid):
    """`q_layernorm` and `k_layernorm` over head_dim; the other layers are short convolutions."""

    model_types = ("lfm2", "lfm2_moe")

    def norm(self, layer: Part, hidden: Tensor) -> Tensor:
        return call(layer, "operator_norm", hidden)

    def project(self, attn: Part, x: Tensor) -> Tensor:
        return call(attn, "q_layernorm", split_heads(call(attn, "q_proj", x), attn.head_dim))

    def project_keys_values(self, attn: Part, x: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().project_keys_values(attn, x)
        return call(attn, "k_layernorm", keys), values


class Lfm3(Qwen3):
    """Norms as Qwen3's, behind `operator_norm`."""

    model_types = ("lfm3",)

    def norm(self, layer: Part, hidden: Tensor) -> Tensor:
        return call(layer, "operator_norm", hidden)


class OlmoHybrid(Olmo2):
    """OLMo 2 where there is attention; some models have no rotary embedding."""

    model_types = ("olmo_hybrid",)

    def rotate(self, decoder, layer, attn, q, position_ids, position_embeddings, hidden) -> Tensor:
        if decoder.rotary_emb is None:
            return q
        return super().rotate(decoder, layer, attn, q, position_ids, position_embeddings, hidden)


class LaraMini(Qwen3):
    """Qwen3 where there is attention; only the sliding-window layers have a rotary embedding."""

    model_types = ("lara_mini",)

    def rotate(self, decoder, layer, attn, q, position_ids, position_embeddings, hidden) -> Tensor:
        if decoder.config.layer_types[attn.layer_idx] != "sliding_attention":
            return q
        return super().rotate(decoder, layer, attn, q, position_ids, position_embeddings, hidden)


register_family(Hybrid())
register_family(GraniteHybrid())
register_family(Jamba())
register_family(NemotronH())
register_family(FalconH1())
register_family(Lfm2())
register_family(Lfm3())
register_family(OlmoHybrid())
register_family(LaraMini())
