"""Attention weights per key, which fused kernels do not return."""

from __future__ import annotations

import torch

from scout_hf.fusion import Partial

# float32 scores per chunk: 4 MiB, to fit into a CPU cache.
MOST_SCORES = 1 << 20


def attend_weighing(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    allowed: torch.Tensor | None = None,
) -> tuple[Partial, torch.Tensor]:
    """Attention of one query per row, and the attention weight of every key.

    Parameters
    ----------
    query : Tensor (batch, query_heads, 1, head_dim)
    keys, values : Tensor (batch, kv_heads, tokens, head_dim)
    scale, softcap
        As :func:`scout_hf.kernels.attend.attend`.
    allowed : Tensor of bool, broadcastable to (batch, kv_heads, 1, tokens), or None

    Returns
    -------
    Partial
    Tensor (batch, kv_heads, tokens), float32 at least
        Softmax weights over these keys; the maximum over each GQA group.
    """
    scores = _scores(query, keys, scale, softcap, allowed)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.unsqueeze(-1)).nan_to_num(0.0)
    out = weights.flatten(2, 3) @ values.to(weights.dtype)
    return Partial(out.reshape(query.shape), lse.reshape(query.shape[:3])), weights.amax((2, 3))


def mean_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    allowed: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """The mean attention weight of every key over several queries.

    Parameters
    ----------
    query : Tensor (batch, query_heads, queries, head_dim)
    keys : Tensor (batch, kv_heads, tokens, head_dim)
    allowed : Tensor of bool, broadcastable to (batch, kv_heads, 1, tokens), or None
    real : Tensor (batch, queries) of bool, or None
        False for queries to ignore (padding).
    causal : bool
        Causal mask; the queries are the last tokens.

    Returns
    -------
    Tensor (batch, kv_heads, tokens), float32 at least
        The maximum over each GQA group.
    """
    batch, heads, queries, _ = query.shape
    tokens, wide = keys.shape[2], torch.promote_types(query.dtype, torch.float32)
    total = torch.zeros((batch, keys.shape[1], heads // keys.shape[1], tokens), dtype=wide, device=query.device)
    step = max(1, MOST_SCORES // max(1, batch * heads * tokens))
    order = torch.arange(tokens, dtype=torch.int64, device=query.device)
    for first in range(0, queries, step):
        seen, last, visible = allowed, min(first + step, queries), tokens
        if causal:
            visible = tokens - queries + last
            place = torch.arange(tokens - queries + first, visible, dtype=torch.int64, device=query.device)
            before = (order[None, :visible] <= place[:, None])[None, None]
            seen = before if allowed is None else before & allowed[..., :visible]
        weights = _scores(query[:, :, first:last], keys[:, :, :visible], scale, softcap, seen).softmax(-1)
        if allowed is not None:
            weights = weights.nan_to_num_(0.0)  # NaN for a fully masked query
        if real is not None:
            weights = weights.mul_(real[:, None, None, first:last, None])
        total[..., :visible] += weights.sum(3)
    count = queries if real is None else real.sum(-1).clamp(min=1)[:, None, None, None]
    return (total / count).amax(2)


def _scores(
    query: torch.Tensor, keys: torch.Tensor, scale: float, softcap: float | None, allowed: torch.Tensor | None
) -> torch.Tensor:
    """(batch, kv_heads, group, queries, tokens)"""
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, _, queries, dim = query.shape
    grouped = query.to(wide).reshape(batch, keys.shape[1], -1, dim)
    scores = (grouped @ keys.to(wide).transpose(-1, -2)).unflatten(2, (-1, queries)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if allowed is None else scores.masked_fill(~allowed.unsqueeze(2), -torch.inf)
