"""Sizes that a config may say for each layer: from transformers 5.24 on such configs refuse to be asked as a whole."""

from __future__ import annotations

from typing import Any


def head_dims(text_config: Any) -> set[int | None]:
    """The head sizes of a model's layers; None where the config does not say.

    Parameters
    ----------
    text_config : PreTrainedConfig

    Returns
    -------
    set of int or None
    """
    if getattr(text_config, "is_heterogeneous", False):
        return {getattr(layer, "head_dim", None) for layer in text_config.per_layer_config}
    found = {getattr(text_config, "head_dim", None)}
    # Full layers of Gemma 4, before.
    return found if (full := getattr(text_config, "global_head_dim", None)) is None else found | {full}


def config_of(text_config: Any, layer: int) -> Any:
    """The config of one layer, where layers have configs of their own; else that of the model."""
    return text_config.per_layer_config[layer] if getattr(text_config, "is_heterogeneous", False) else text_config
