"""Layers that attend over the keys and values of another layer, and what a cache of transformers has in their place."""

from __future__ import annotations

from typing import Any

from transformers import cache_utils

# In 5.24; before, such layers had no place in a cache.
_DUMMY = getattr(cache_utils, "DummyLayer", ())
# Where releases before 5.5 put what layers of a pass share.
_IN_CACHE = "shared_layers"


def storing_layers(text_config: Any) -> dict[int, int]:
    """For each layer that attends over the KV of another one: the layer that stores it.

    The last ``num_kv_shared_layers`` layers have no keys and values of their own. Each takes those of the last layer
    of its type that has.

    Parameters
    ----------
    text_config : PreTrainedConfig

    Returns
    -------
    dict of int to int
        Empty for models without such layers.
    """
    types = list(getattr(text_config, "layer_types", None) or ())
    first = len(types) - (getattr(text_config, "num_kv_shared_layers", None) or 0)
    # Early-exit drafting lowers the number of layers that run.
    last = min(len(types), getattr(text_config, "num_hidden_layers", len(types)))
    stored = {kind: layer for layer, kind in enumerate(types[:first])}
    return {layer: stored[types[layer]] for layer in range(first, last) if types[layer] in stored}


def holds_nothing(layer: Any) -> bool:
    """Whether a layer of a cache only keeps the place of a layer without keys and values."""
    return isinstance(layer, _DUMMY)


def forget_shared(cache: Any) -> None:
    """Drop the tensors that layers of the last pass shared."""
    cache.__dict__.pop(_IN_CACHE, None)
