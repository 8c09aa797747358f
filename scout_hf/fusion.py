"""Merging attention over disjoint sets of keys by log-sum-exp. Natural logarithm everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Partial(NamedTuple):
    """Attention over a part of the keys.

    out : Tensor (batch, query_heads, queries, head_dim)
        Softmax-weighted values of this part; exactly 0 where the part is empty.
    lse : Tensor (batch, query_heads, queries), float32 or float64
        Natural log of the sum of exponentials of this part's scores; -inf where the part is empty.
    """

    out: torch.Tensor
    lse: torch.Tensor


def fuse(partials: Sequence[Partial]) -> Partial:
    """Attention over the union of disjoint parts (online softmax; FlashAttention, ScoutAttention 3.3).

    Computed in float32, or float64 where the LSE is float64; a NaN in any part reaches the result.
    """
    if len(partials) == 1:
        return partials[0]
    lses = torch.stack([part.lse for part in partials])
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.where(lse == -torch.inf, 0.0, torch.exp(lses - lse)).unsqueeze(-1)
    out = partials[0].out.to(lse.dtype) * weights[0]
    for part, weight in zip(partials[1:], weights[1:]):
        out = torch.addcmul(out, part.out.to(lse.dtype), weight)
    return Partial(out, lse)


def empty_like(query: torch.Tensor) -> Partial:
    """The partial over no keys at all, for a query of shape (batch, query_heads, queries, head_dim)."""
    out = torch.zeros_like(query, dtype=torch.promote_types(query.dtype, torch.float32))
    return Partial(out, out.new_full(query.shape[:-1], -torch.inf))
