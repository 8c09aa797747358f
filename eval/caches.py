"""Caches of stock and patched models: making them, filling them without a prompt, and their bytes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

import scout_hf
from scout_hf import ScoutCache, ScoutConfig

DTYPE = torch.bfloat16


class Caches(NamedTuple):
    """Makes empty caches of a setting; ``handle`` is that of the patch, None for stock attention."""

    new: Callable[[], Cache]
    handle: scout_hf.Handle | None = None


@contextmanager
def caches_of(model: PreTrainedModel, config: ScoutConfig | None = None, **options: Any) -> Iterator[Caches]:
    """Patch a model for the time of the block, unless it is meant to be stock.

    >>> with caches_of(model, ScoutConfig(budget=512)) as caches:
    ...     model.generate(**inputs, past_key_values=caches.new())

    Parameters
    ----------
    model : PreTrainedModel
    config : ScoutConfig or None
        None, without options, for stock attention and a DynamicCache.
    **options
        As ``scout_hf.patch`` takes them.
    """
    if config is None and not options:
        yield Caches(lambda: DynamicCache(config=model.config))
        return
    with warnings.catch_warnings():
        # Comparisons give the same settings to methods that use them and to methods that do not.
        warnings.filterwarnings("ignore", message=".* no effect with method=", category=UserWarning)
        handle = scout_hf.patch(model, config, **options)
    with handle:
        yield Caches(handle.new_cache, handle)


@torch.no_grad()
def fill(
    cache: Cache, config: Any, tokens: int, rows: int = 1, seed: int = 0, device: str | torch.device = "cpu"
) -> Cache:
    """Give every layer of an empty cache the same random keys and values, in every row; returns the cache."""
    parts = [part.to(device).expand(rows, -1, -1, -1) for part in random_kv(config, tokens, seed)]
    for layer in range(config.num_hidden_layers):
        cache.update(*parts, layer)
    return cache


def random_kv(config: Any, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one layer in bf16, (1, kv_heads, tokens, head_dim) each."""
    random = torch.Generator().manual_seed(seed)
    shape = (1, config.num_key_value_heads, tokens, _head_dim(config))
    keys, values = (torch.empty(shape, dtype=DTYPE).normal_(generator=random) for _ in range(2))
    return keys, values


def kv_bytes_per_token(config: Any) -> int:
    """Of all layers, in bf16."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * _head_dim(config) * DTYPE.itemsize


def _head_dim(config: Any) -> int:
    # Not every family's config has it, such as Qwen2's.
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def tensors_in(parts: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts; for a tensor subclass, its inner tensors."""
    if isinstance(parts, dict):
        parts = list(parts.values())
    if isinstance(parts, (list, tuple)):
        for part in parts:
            yield from tensors_in(part)
    elif hasattr(parts, "__tensor_flatten__"):
        yield from tensors_in([getattr(parts, name) for name in parts.__tensor_flatten__()[0]])
    elif isinstance(parts, torch.Tensor):
        yield parts


def tensor_bytes(parts: Any) -> int:
    """Bytes of :func:`tensors_in`."""
    return sum(part.numel() * part.element_size() for part in tensors_in(parts))


def kv_bytes(cache: Cache) -> dict[str, int]:
    """Bytes of a cache by tier; a stock cache has the tier ``stock`` only."""
    return cache.tier_bytes() if isinstance(cache, ScoutCache) else {"stock": tensor_bytes(_keys_and_values(cache))}


def held_bytes(cache: Cache, device: torch.device) -> dict[str, int]:
    """Bytes on the host, on the device and of digests; without a GPU all of a stock cache counts as the device's."""
    held = {"host": 0, "device": 0, "digests": 0}
    if isinstance(cache, ScoutCache):
        return held | cache.tier_bytes()
    for part in tensors_in(_keys_and_values(cache)):
        held["device" if part.device.type == device.type else "host"] += tensor_bytes(part)
    return held


def stats_and_bytes(handle: scout_hf.Handle | None, cache: Cache) -> dict[str, Any]:
    """Statistics of the decode steps so far, and bytes held, of one arm, for JSON; no handle for stock attention.

    ``exact``, ``device_bytes``, ``host_bytes`` and, where known, ``attended_tokens``, ``link_bytes``, ``join_ms``,
    ``cpu_ratio`` and ``notes``.
    """
    from transformers import QuantizedCache

    if handle is None:
        # A quantized cache holds them in objects of its own.
        total, host = tensor_bytes([vars(layer) for layer in cache.layers]), getattr(cache, "offloading", False)
        found = {"exact": not isinstance(cache, QuantizedCache), "device_bytes": 0 if host else total}
        # What is offloaded crosses in every step.
        return found | {"host_bytes": total if host else 0} | ({"link_bytes": float(total)} if host else {})
    stats, held = handle.stats(), cache.tier_bytes()
    one_tier = "device" not in held
    return {
        "exact": stats.exact,
        "attended_tokens": stats.attended_tokens,
        "device_bytes": held.get("digests", 0) + (held["host"] if one_tier else held["device"]),
        "host_bytes": 0 if one_tier else held["host"],
        "link_bytes": stats.recalled_bytes / max(1, stats.steps),
        "join_ms": stats.join_wait_ms,
        "cpu_ratio": stats.cpu_ratio,
        "notes": list(stats.notes),
    }


def _keys_and_values(cache: Cache) -> list[Any]:
    return [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
