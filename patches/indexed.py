"""Models with layers that choose with an indexer what they attend to."""

from __future__ import annotations

from scout_hf.compat.indexed_layers import choosing_layers, keep_positions
from scout_hf.errors import UnsupportedModelError

from .base import Part
from .qwen3 import Qwen3
from .registry import register_family
from .unpredicted import Unpredicted


class MiniMaxM3(Qwen3):
    """Qwen3; some layers choose blocks, with one choice per KV head or for several."""

    model_types = ("minimax_m3_vl_text",)

    def check(self, decoder: Part) -> None:
        heads, choices = decoder.config.num_key_value_heads, decoder.config.index_n_heads
        if heads % choices and choosing_layers(decoder.config):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} has num_key_value_heads={heads} and index_n_heads={choices}; a ScoutCache "
                "follows an indexer whose heads divide the KV heads. Use the model unpatched"
            )


class Indexed(Unpredicted):
    """All their layers with full attention choose. Nothing is selected for them, so that no query is needed ahead."""

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


register_family(MiniMaxM3())
register_family(Indexed())
register_family(Qwen4Exp())
