"""A prompt that a cache holds, and what follows on it."""

import torch
from transformers.cache_utils import DynamicCache

from scout_hf import CACHE
from tests.integration.common import prompt, run


def two_turns(rows=1, new=7):
    """40 tokens, and the same with more behind them."""
    ids = prompt(rows, 40)
    return ids, torch.cat([ids, prompt(rows, new, seed=5)], 1)


def filled(model, cache, ids):
    with torch.no_grad():
        model(ids, **{CACHE: cache}, use_cache=True)
    return cache


def continued(model, cache, ids, new=4, **options):
    """What follows on these tokens, of which the cache holds all that came before."""
    return run(model, ids, new=new, **{CACHE: cache}, **options)


def stock(model, ids, longer):
    """What stock gives in the same calls: Jamba's scan begins anew in every pass of several tokens."""
    return continued(model, filled(model, DynamicCache(config=model.config), ids), longer)
