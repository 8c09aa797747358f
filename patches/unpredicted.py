"""Families without prediction: a layer's query depends on more than its input."""

from __future__ import annotations

from torch import Tensor

from scout_hf.errors import UnsupportedModelError

from .base import Family, Part
from .registry import register_family


class Unpredicted(Family):
    """`available` is always False, so that the real query is used.

    Llama4 scales the query by the length of the cache, Zaya mixes in previous tokens, and in the others the decoder
    passes angles or scalings to each layer that cannot be computed from outside.
    """

    model_types: tuple[str, ...] = (
        "beam",
        "granite_swa",
        "granitemoe_swa",
        "llama4_text",
        "molmo2_text",
        "muse_glimmer_text",
        "muse_spark_text",
        "zaya",
    )

    def available(self, layer: Part) -> bool:
        return False

    def query(self, decoder, layer, hidden, position_ids=None, position_embeddings=None) -> Tensor:
        raise UnsupportedModelError(
            f"the query of {type(layer).__name__} cannot be predicted from a hidden state: check "
            "available(layer) first, and use the real query where it is False."
        )

    def keys_values(self, decoder, layer, hidden, position_ids=None, position_embeddings=None) -> tuple[Tensor, Tensor]:
        raise UnsupportedModelError(
            f"the keys and values of {type(layer).__name__} cannot be made from a hidden state: check "
            "available(layer) first, and keep the real ones where it is False."
        )


register_family(Unpredicted())
