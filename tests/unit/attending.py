"""What tests of attention on the CPU share with a process of their own."""

from __future__ import annotations

import ctypes

import torch

BATCH, KV_HEADS, DIM = 2, 2, 16


def make_query(group, seed=0, dtype=torch.float32, dim=DIM, batch=BATCH, heads=KV_HEADS):
    generator = torch.Generator().manual_seed(seed + 99)
    return torch.randn(batch, heads * group, 1, dim, generator=generator).to(dtype)


def assert_same(got, expected):
    assert got.tokens == expected.tokens
    assert all(torch.equal(a, b) for a, b in zip(got.partial, expected.partial))


def held_back(backend):
    """Jobs of this native backend wait for the word that is returned."""
    word, submit = ctypes.c_uint64(0), backend._pool.submit
    backend._pool.submit = lambda *args, **options: submit(*args, **options, flag=ctypes.addressof(word), value=1)
    return word
