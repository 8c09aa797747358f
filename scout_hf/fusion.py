"""Merging attention over disjoint sets of keys by log-sum-exp. Natural logarithm everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Partial(NamedTuple):
    """Attention over a subset of the keys.

    Attributes
    ----------
    out : Tensor (batch, query_heads, queries, head_dim)
        Softmax-weighted values over this subset; exactly 0 where it is empty.
    lse : Tensor (batch, query_heads, queries), float32 or float64
        Natural log of the sum of exponentials of the scores; -inf where the subset is empty.
    """

    out: torch.Tensor
    lse: torch.Tensor


def fuse(partials: Sequence[Partial]) -> Partial:
    """Merge attention over disjoint subsets of the keys (online softmax; ScoutAttention, section 3.3).

    Parameters
    ----------
    partials : sequence of Partial
        At least one; equal shapes.

    Returns
    -------
    Partial
        Attention over the union, in the dtype of the LSE. A single partial is returned as it is. NaN propagates.

    Examples
    --------
    >>> both = fuse([attend(query, keys[:, :, :60], values[:, :, :60], scale, None),
    ...              attend(query, keys[:, :, 60:], values[:, :, 60:], scale, None)])
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
    """The partial over no keys, for a query of shape (batch, query_heads, queries, head_dim)."""
    out = torch.zeros_like(query, dtype=torch.promote_types(query.dtype, torch.float32))
    return Partial(out, out.new_full(query.shape[:-1], -torch.inf))
