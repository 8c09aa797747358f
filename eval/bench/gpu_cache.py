"""One cache of two tiers for all arms of ``bench gpu``: filled without a prompt, once, and used with other settings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel

from scout_hf import ScoutCache, ScoutConfig
from scout_hf.eval.caches import random_kv
from scout_hf.stores import Links

REPEATED_TOKENS = 4096


@torch.no_grad()
def fill_two_tiers(cache: ScoutCache, model: PreTrainedModel, tokens: int, rows: int, seed: int = 0) -> None:
    """Give every layer of an empty cache the same random keys and values, repeated, in every row.

    A layer's pages are allocated at once, and written over the link as those of a prompt are.
    """
    size, links = min(tokens, REPEATED_TOKENS), Links()
    parts = [part.to(model.device) for part in random_kv(model.config, size, seed)]
    first = cache.scout_config.block_size
    for layer in range(len(cache.layers)):
        keys, values = (
            part.repeat(1, 1, -(-tokens // size), 1)[:, :, :tokens].expand(rows, -1, -1, -1) for part in parts
        )
        # A block, which stays in the window: ``update`` would write all of it back through pageable memory.
        cache.update(keys[:, :, :first], values[:, :, :first], layer)
        method = cache.layers[layer].method
        method.append(keys[:, :, first:], values[:, :, first:])
        method.settle(SimpleNamespace(mask=None, links=links))
        method.drain()


def switched(cache: ScoutCache, **options: Any) -> ScoutCache:
    """A fork that decodes with other settings of a step (``hand_over``, ``cpu_query``, ``recall``, ``layer_ahead``).

    It shares the pages, and ``cache`` stays as it is: every fork begins at the same tokens, without residents if
    ``cache`` has none.
    """
    twin = cache.fork()
    twin.scout_config = config = ScoutConfig.from_options(cache.scout_config, **options)
    for layer in twin.scout_layers:
        method = layer.method
        layer.config = method.config = config
        method.executor = type(method.executor)(config, method.kv)
        method.executor.pages_changed(method, rows=True)
        method.gate = type(method.gate)(config.cpu_query)
        method.recall_policy = type(method.recall_policy)(config.recall, layer.layer_idx)
    return twin
