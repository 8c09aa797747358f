"""Models of which every layer with full attention chooses with an indexer what it attends to."""

from __future__ import annotations

from scout_hf.compat.indexed_layers import choosing_layers, keep_positions
from scout_hf.errors import UnsupportedModelError

from .base import Part
from .registry import register_family
from .unpredicted import Unpredicted


class Indexed(Unpredicted):
    """Nothing is selected for them, so that no query is needed ahead."""

    model_types: tuple[str, ...] = ("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4")

    def check(self, decoder: Part) -> None:
        if not choosing_layers(decoder.config):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} keeps the keys of its indexer in its own modules in this release of "
                "transformers, not in a cache layer; try a newer one, or use the model unpatched"
            )


class Qwen4Exp(Indexed):
    """Hands all positions of the context to its indexer."""

    model_types = ("qwen4_exp_text",)

    def check(self, decoder: Part) -> None:
        super().check(decoder)
        if not keep_positions(decoder.config):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} puts the positions of all tokens on the cache itself in this release of "
                "transformers, where no crop, reorder or copy of a cache changes them; use transformers 5.24 or newer, "
                "or the model unpatched"
            )


register_family(Indexed())
register_family(Qwen4Exp())
