"""Cache layers that hold keys of an indexer, with which a layer of the model chooses what it attends to."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer

from scout_hf.compat.linear_layers import LinearAndFull

UPDATES = ("update_index", "update_indexer")
"""What such layers name the function that takes new keys of the indexer: MiniMax M3, and all others."""


def has_indexer(layer: Any) -> bool:
    """Whether a cache layer of transformers holds keys of an indexer beside keys and values."""
    return DynamicLayer in type(layer).__bases__ and any(hasattr(layer, name) for name in UPDATES)


def choosing_layers(text_config: Any) -> tuple[int, ...]:
    """The layers of a model that choose themselves what they attend to.

    Parameters
    ----------
    text_config : PreTrainedConfig

    Returns
    -------
    tuple of int
        Empty for models without an indexer.
    """
    layers = DynamicCache(config=text_config).layers
    return tuple(index for index, layer in enumerate(layers) if has_indexer(layer))


def all_choose(text_config: Any) -> bool:
    """Whether every layer of full attention chooses itself what it attends to, and there are some."""
    layers = DynamicCache(config=text_config).layers
    others = any(type(layer) in (DynamicLayer, LinearAndFull) for layer in layers)
    return not others and any(map(has_indexer, layers))


def keep_positions(text_config: Any) -> bool:
    """Whether the layers that choose have a place for positions; releases before 5.24 put them on the cache itself."""
    layers = DynamicCache(config=text_config).layers
    return all(hasattr(layer, "indexer_position_ids") for layer in layers if has_indexer(layer))


def chooses_first(text_config: Any) -> bool:
    """Whether layers add keys of their indexer before keys and values, not behind them."""
    return text_config.model_type == "qwen4_exp_text"


def fill_indexer(layer: Any, keys: Any) -> None:
    """Give a stock layer without tokens the keys of its indexer."""
    name = next(name for name in UPDATES if hasattr(layer, name))
    getattr(layer, name)(keys)
