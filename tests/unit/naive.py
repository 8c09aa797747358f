"""Slow, obvious counterparts of what the package does, in float64. Nothing of the package's own arithmetic is used."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

QUICK = settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def attention(query, keys, values, scale, softcap=None, allowed=None, causal=False):
    """(out, natural LSE) in float64; rows without keys give 0, -inf. ``allowed`` broadcasts to (b, kv_heads, q, t)."""
    query, keys, values = query.double(), keys.double(), values.double()
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.einsum("bhqd,bhtd->bhqt", query, keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if allowed is not None:
        allowed = allowed.expand(allowed.shape[0], scores.shape[1] // group, *allowed.shape[2:])
        scores = scores.masked_fill(~allowed.repeat_interleave(group, 1), -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)
    weights = torch.exp(scores - top)
    total = weights.sum(-1)
    lse = torch.where(total > 0, total.log() + top.squeeze(-1), -torch.inf)
    out = torch.einsum("bhqt,bhtd->bhqd", weights, values) / total.clamp(min=1e-300).unsqueeze(-1)
    return out, lse


def poison(monkeypatch):
    """Fill pages with NaN when they are handed out and when they come back: nobody may read one before writing it.

    Packed pages get NaN for scales.
    """
    from scout_hf.stores.pages import PagePool

    allocate, recycle = PagePool.allocate, PagePool._recycle

    def fill(pool, ids):
        for page in ids.reshape(-1).tolist():
            slab = max(i for i, start in enumerate(pool.starts) if start <= page)
            pool.slabs[slab][page - pool.starts[slab]].view(torch.uint8).fill_(0xFF)  # NaN in every type of float

    def allocate_poisoned(pool, count):
        ids = allocate(pool, count)
        fill(pool, ids)
        return ids

    def recycle_poisoned(pool, ids):
        fill(pool, ids)
        recycle(pool, ids)

    monkeypatch.setattr(PagePool, "allocate", allocate_poisoned)
    monkeypatch.setattr(PagePool, "_recycle", recycle_poisoned)
