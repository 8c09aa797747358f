"""What tests of digests and selection share: keys and stores drawn from a seed, padding, and scores in plain loops."""

from __future__ import annotations

import random
from dataclasses import MISSING, fields

import torch

from scout_hf.step import Step
from scout_hf.stores import PagedKV
from tests.libraries import without_library

BATCH, HEADS, DIM, SIZE = 3, 2, 16, 8
KEYS = torch.empty(BATCH, HEADS, 0, DIM)
PADDING = [None, "left", "holes", "an empty row"]


def draw(seed, batch, kv_heads, group, blocks, size, dim, dtype=torch.float32, loud=1.0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * group, 1, dim, generator=generator) * loud
    keys = torch.randn(batch, kv_heads, blocks, size, dim, generator=generator) * loud
    return query.to(dtype), keys.to(dtype)


def naive_score(query, keys, padding_mask=None):
    """sum over the group of sum_d max(q_d * min_d, q_d * max_d), block by block, in float64."""
    batch, kv_heads, blocks, _, dim = keys.shape
    grouped = query.double().view(batch, kv_heads, -1, dim)
    score = torch.zeros(batch, kv_heads, blocks, dtype=torch.float64)
    for row in range(batch):
        for block in range(blocks):
            real = keys[row, :, block].double()
            if padding_mask is not None:
                real = real[:, padding_mask[row, block]]
            if real.shape[1]:
                low, high = real.amin(1)[:, None], real.amax(1)[:, None]
                score[row, :, block] = torch.maximum(grouped[row] * low, grouped[row] * high).sum(-1).sum(-1)
    return score


def make_store(tokens, seed, dtype=torch.float32, kind=PagedKV, native=True):
    keys = torch.randn(2, BATCH, HEADS, tokens, DIM, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if native:
        store = kind(BATCH, HEADS, DIM, SIZE, dtype, "cpu")
    else:
        with without_library():
            store = kind(BATCH, HEADS, DIM, SIZE, dtype, "cpu")
    for first in range(0, tokens, 13):
        store.append(*keys[:, :, :, first : first + 13])
    return store


def make_mask(kind, tokens, seed):
    generator, dice = torch.Generator().manual_seed(seed), random.Random(seed)
    if kind == "holes":
        return torch.rand(BATCH, tokens, generator=generator) > dice.choice([0.1, 0.9])
    starts = torch.tensor([dice.randint(0, tokens - 1) for _ in range(BATCH)])
    if kind == "an empty row":
        starts[dice.randrange(BATCH)] = tokens
    return None if kind is None else torch.arange(tokens) >= starts[:, None]


def make_step(tokens, mask, backend=None):
    required = {field.name: None for field in fields(Step) if field.default is field.default_factory is MISSING}
    return Step(**{**required, "queries": 1, "tokens": tokens, "mask": mask, "backend": backend})
