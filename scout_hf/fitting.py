"""Checks that settings and a cache fit a model, before anything is stored."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, NoReturn

import torch

from scout_hf.compat.indexed_layers import all_choose, choosing_layers
from scout_hf.compat.per_layer import config_of, head_dims
from scout_hf.compat.shared_kv import storing_layers
from scout_hf.config import OF_PATCH, ScoutConfig
from scout_hf.errors import CacheStateError, ConfigError, UnsupportedModelError
from scout_hf.kernels.cpu import find_backend
from scout_hf.layouts import latent_widths
from scout_hf.methods.base import find_method
from scout_hf.ranks import Ranks, rules_of_attention
from scout_hf.recall_intervals import RecallIntervals
from scout_hf.selection import check_digest


def check_own_names(options: dict[str, Any]) -> None:
    """Raise ConfigError for what is nearly an argument of ``patch`` itself, which is no setting."""
    known = [field.name for field in dataclasses.fields(ScoutConfig)]
    for name in options.keys() - known:
        if not difflib.get_close_matches(name, known, 1) and (near := difflib.get_close_matches(name, OF_PATCH, 1)):
            raise ConfigError(f"unknown setting {name!r}, did you mean {near[0]!r}? See scout_hf.patch")


def check_names(config: ScoutConfig, text_config: Any, layers: int) -> None:
    """Raise ConfigError if ``config`` names something unknown, or does not fit a model of so many layers."""
    method = find_method(config.method)
    method.check(config)
    if (readers := storing_layers(text_config)) and not method.can_lend:
        raise ConfigError(
            f"method={config.method!r} is not possible for {text_config.model_type}: its layers {min(readers)} to "
            f"{max(readers)} attend over the KV of other layers, and {config.method!r} keeps beside KV what belongs to "
            "the queries or inputs of one layer; try 'scout', or 'dense' to attend to everything"
        )
    if choosing := choosing_layers(text_config):
        _check_choosing(config, text_config, choosing)
    mass = config.mass if method.uses is None or "mass" in method.uses | method.uses_in_drafts else None
    # The head_dim of a config with latent attention is that of the rotated part alone.
    for head_dim in [None] if latent_widths(config_of(text_config, 0)) else head_dims(text_config):
        check_digest(config.digest, head_dim, mass)
    find_backend(config.cpu_backend)
    if isinstance(config.recall, RecallIntervals):
        config.recall.check(text_config.model_type, layers)
    dense = config.dense_layers
    if any(index >= layers for index in dense) if isinstance(dense, tuple) else dense > layers:
        raise ConfigError(
            f"dense_layers={config.dense_layers!r} is not allowed: this model has layers 0 to {layers - 1}; a "
            "number is how many of the first layers, a tuple which layers"
        )


def _check_choosing(config: ScoutConfig, text_config: Any, choosing: tuple[int, ...]) -> None:
    """Raise ConfigError for settings that contradict a model whose layers ``choosing`` choose by themselves."""
    given = f" is not possible for {text_config.model_type}: its layers {choosing[0]} to {choosing[-1]} choose with an "
    given += "indexer of their own what they attend to, "
    if config.method != "scout":
        raise ConfigError(f"method={config.method!r}{given}which only 'scout' follows; try method='scout'")
    if any(config.names_dense(layer) for layer in choosing):
        raise ConfigError(f"dense_layers={config.dense_layers!r}{given}and were trained with that; leave it out")
    chosen = not config.attends_all and (config.budget != "auto" or config.mass is not None)
    if chosen and all_choose(text_config):
        name, value = ("mass", config.mass) if config.mass is not None else ("budget", config.budget)
        raise ConfigError(
            f"{name}={value!r}{given}and there are no others to choose for; leave it out, and see the model's config "
            "for how much its indexer chooses"
        )


def layers_of(text_config: Any, default: int | None = None) -> int | None:
    """Number of layers of a model, with those that share the KV of another; early-exit drafting lowers it."""
    return getattr(text_config, "num_hidden_layers", default)


def refuse_other_depth(cache: Any, text_config: Any) -> None:
    """Raise CacheStateError if the cache was made for another number of layers than the model has."""
    expected = layers_of(text_config, cache.depth)
    if cache.depth != expected:
        raise CacheStateError(
            f"the cache was made for a model of {cache.depth} layers and was given to one of {expected}: some layers "
            "would lack tokens that others have; use a cache of this model, handle.new_cache() or "
            "ScoutCache(model.config)"
        )


def refuse_unlike(keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> NoReturn:
    """Raise CacheStateError for keys and values that are not of as many rows, KV heads and tokens."""
    raise CacheStateError(
        f"layer {layer_idx} got keys {tuple(keys.shape)} and values {tuple(values.shape)}; they must be of as many "
        "rows, KV heads and tokens: (batch, kv_heads, tokens, head_dim), where head_dim may differ"
    )


def refuse_other_sizes(
    batch: int, sizes: tuple[int, int], keys: torch.Tensor, layer_idx: int, same_layout: bool = True
) -> None:
    """Raise CacheStateError unless new keys (batch, kv_heads, tokens, head_dim) fit the rows and sizes in the cache."""
    rows, heads, _, head_dim = keys.shape
    if rows == batch and heads == sizes[0] and head_dim == sizes[1] and same_layout:
        return
    if (heads, head_dim) != sizes or not same_layout:
        got = f"{heads} with {head_dim}" if same_layout else "keys or values of another width"
        raise CacheStateError(
            f"layer {layer_idx} of the cache holds {sizes[0]} KV heads with {sizes[1]} channels and got {got}: it was "
            "filled by another model; use a cache of this model, handle.new_cache() or ScoutCache(model.config)"
        )
    refuse_other_rows(batch, rows)


def refuse_other_rows(batch: int, rows: int) -> None:
    """Raise CacheStateError unless ``rows`` new ones fit the ``batch`` rows in the cache."""
    if rows != batch:
        raise CacheStateError(
            f"the cache holds {batch} rows and got {rows} new ones; use batch_repeat_interleave or "
            "batch_select_indices, or start with a new ScoutCache"
        )


def refuse_over_ranks(config: ScoutConfig, ranks: Ranks) -> None:
    """Raise ConfigError for settings with which ranks of tensor parallel would have to decide together."""
    if ranks.size == 1:
        return
    if reason := find_method(config.method).over_heads(config):
        raise ConfigError(
            f"method={config.method!r} cannot run on {ranks.size} ranks, each with some of the KV heads: {reason}"
        )
    if config.hand_over == "graph":
        raise ConfigError(
            f"hand_over='graph' cannot run on {ranks.size} ranks: a captured step would hold the sums over ranks, and "
            "ranks that capture or replay at different times would wait for each other; use hand_over='flags'"
        )


def refuse_split_heads(model: Any, family: Any, ranks: Ranks) -> None:
    """Raise UnsupportedModelError if the ranks of a model would share a KV head, which its own passes cannot do."""
    if ranks.size == 1:
        return
    text = model.config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    spread = "colwise" in rules_of_attention(model, family).values()
    if spread and heads and heads % ranks.size:
        raise UnsupportedModelError(
            f"the {heads} KV heads of this model cannot be divided among {ranks.size} ranks, and transformers divides "
            "none: its own passes fail too; start as many processes as divide them"
        )
