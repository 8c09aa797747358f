"""Queries, keys, padding and fitted digests for the tests of kernels that make digests and score them."""

from __future__ import annotations

import torch

from scout_hf.selection import make_digest
from tests.triton.grid import DEVICE

GROUPS, DIMS, SIZES = (1, 2, 4, 5, 7, 8, 16), (64, 80, 96, 128, 256), (8, 16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(seed, batch, heads, group, blocks, size, dim, dtype=torch.float32, loud=1.0):
    """A query (batch, heads * group, 1, dim) and keys (batch, heads, blocks, size, dim), loud in some channels."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads * group, 1, dim, generator=generator) * loud
    keys = torch.randn(batch, heads, blocks, size, dim, generator=generator) * loud
    keys *= torch.rand(dim, generator=generator).mul(3).exp2()
    keys += torch.randn(dim, generator=generator)
    return query.to(DEVICE, dtype), keys.to(DEVICE, dtype)


def some_padding(batch, blocks, size):
    """A whole block of it, blocks that begin and that end with it, and single tokens of it."""
    padding_mask = torch.ones(batch, blocks, size, dtype=torch.bool, device=DEVICE)
    padding_mask[0, 0], padding_mask[0, 1 % blocks, : size // 2] = False, False
    padding_mask[-1, -1, size - size // 4 :], padding_mask[-1, blocks // 2, ::3] = False, False
    return padding_mask


def fitted(name, keys, query=None, padding_mask=None):
    digest = make_digest(name)
    power = None
    if query is not None:
        power = query.float().square().mean(2).unflatten(1, (keys.shape[1], -1)).mean(2)
    digest.fit(keys, padding_mask, power, keys.shape[-1] ** -0.5)
    return digest
