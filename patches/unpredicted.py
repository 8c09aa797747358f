"""Families that are served without prediction: a layer's query cannot be told from its input alone."""

from __future__ import annotations

from torch import Tensor

from scout_hf.errors import UnsupportedModelError

from .base import Family, Part
from .registry import register_family


class Unpredicted(Family):
    """`available` is always False, so that the true query is used.

    Llama4 tempers the query by the length of the cache, Zaya mixes in the tokens before, and in the others
    the decoder hands every layer rotary angles (or none, or a scaling) that it alone knows.
    """

    model_types = (
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
            f"the query of {type(layer).__name__} cannot be predicted from a hidden state: ask "
            "available(layer) before, and use the true query where it is False."
        )

    def keys_values(self, decoder, layer, hidden, position_ids=None, position_embeddings=None) -> tuple[Tensor, Tensor]:
        raise UnsupportedModelError(
            f"the keys and values of {type(layer).__name__} cannot be made from a hidden state: ask available(layer) "
            "before, and keep the true ones where it is False."
        )


register_family(Unpredicted())
