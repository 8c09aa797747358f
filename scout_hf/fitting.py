"""Whether a cache fits the model that it is given to, told of before anything is stored."""

from __future__ import annotations

from typing import Any

import torch

from scout_hf.errors import CacheStateError


def layers_of(text_config: Any, default: int | None = None) -> int | None:
    """Layers of a model, those that share another's KV included; early exit lowers the number while it drafts."""
    return getattr(text_config, "num_hidden_layers", default)


def refuse_other_depth(cache: Any, text_config: Any) -> None:
    """Raise CacheStateError if the cache was made for another number of layers than the model has."""
    wanted = layers_of(text_config, cache.depth)
    if cache.depth != wanted:
        raise CacheStateError(
            f"the cache was made for a model of {cache.depth} layers and was given to one of {wanted}: some layers "
            "would lack tokens that others have; use a cache of this very model, handle.new_cache() or "
            "ScoutCache(model.config)"
        )


def refuse_other_sizes(held: tuple[int, int, int], keys: torch.Tensor, layer_idx: int) -> None:
    """Raise CacheStateError unless new keys (batch, kv_heads, tokens, head_dim) have the rows and sizes held."""
    rows, *sizes = (keys.shape[axis] for axis in (0, 1, 3))
    if sizes != list(held[1:]):
        raise CacheStateError(
            f"layer {layer_idx} of the cache holds {held[1]} KV heads with {held[2]} channels and got {sizes[0]} with "
            f"{sizes[1]}: it was filled by another model; use a cache of this very model, handle.new_cache() or "
            "ScoutCache(model.config)"
        )
    if rows != held[0]:
        raise CacheStateError(
            f"the cache holds {held[0]} rows and got {rows} new ones; use batch_repeat_interleave or "
            "batch_select_indices, or start with a new ScoutCache"
        )
