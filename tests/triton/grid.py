"""Inputs for the kernels' tests: drawn from a seed, with the awkward cases mixed in."""

from __future__ import annotations

import torch

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
"""Where the kernels run: on a GPU, or in the interpreter. The tests' default device, see conftest.py."""


def generator(seed):
    return torch.Generator("cpu").manual_seed(seed)


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator(seed), device="cpu").to(DEVICE, dtype)


def whole(seed, low, high, *shape):
    return torch.randint(low, high, shape, generator=generator(seed), device="cpu").to(DEVICE)


def chance(seed, share, *shape):
    return (torch.rand(*shape, generator=generator(seed), device="cpu") < share).to(DEVICE)


def lists_of_blocks(seed, batch, heads, blocks, listed, empty=0.2):
    """Distinct block numbers per list in random order, (batch, heads, listed) of int32, some entries empty (-1)."""
    dice = generator(seed)
    ids = [torch.randperm(blocks, generator=dice, device="cpu")[:listed] for _ in range(batch * heads)]
    ids = torch.stack(ids).view(batch, heads, listed).int().to(DEVICE)
    return ids.masked_fill(chance(seed + 1, empty, batch, heads, listed), -1)


def slots_of(ids, blocks):
    """The slot of each block, (batch, heads, blocks) of int32, -1 for none: the inverse of the slots' block numbers."""
    found = torch.full((*ids.shape[:2], blocks + 1), -1, dtype=torch.int32)
    slots = torch.arange(ids.shape[2], dtype=torch.int32).expand(ids.shape)
    found.scatter_(2, torch.where(ids < 0, blocks, ids).long(), slots)
    return found[:, :, :blocks].contiguous()
