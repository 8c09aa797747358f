"""From the attention mass of each query head to one score per KV head, and to the blocks that hold a share of it."""

from __future__ import annotations

import math

import torch


def mean_share(
    masses: torch.Tensor, kv_heads: int, padding_mask: torch.Tensor | None, recent: torch.Tensor | None = None
) -> torch.Tensor:
    """The logarithm of a block's share of the attention mass, as the mean over the query heads of a GQA group.

    A sum of logarithms would let heads that find a block unimportant outvote the one that needs it.

    Parameters
    ----------
    masses : Tensor (batch, query_heads, blocks) of float32
        Logarithms, base 2; -inf for a block that is not there.
    kv_heads : int
    padding_mask : Tensor (batch, blocks) of bool, or None
        False for blocks of only padding, which take no share; None if there are none.
    recent : Tensor (batch, query_heads) of float32, or None
        Logarithms, base 2, of the mass of newer tokens, which takes its share.

    Returns
    -------
    Tensor (batch, kv_heads, blocks) of float32
        Base 2. Without ``recent``, powers of two of real blocks add up to 1. Undefined for blocks of only padding.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.selection.group_mass import mean_share
    >>> mean_share(torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]), kv_heads=1, padding_mask=None)
    tensor([[[-1., -1.]]])
    """
    natural = masses.unflatten(1, (kv_heads, -1)) * math.log(2)
    if padding_mask is not None:
        natural = natural.masked_fill(~padding_mask[:, None, None], -torch.inf)
    whole = natural.logsumexp(-1, keepdim=True)
    if recent is not None:
        whole = torch.logaddexp(whole, recent.unflatten(1, (kv_heads, -1))[..., None] * math.log(2))
    # In logarithms to the end: a share may be too small for a float.
    shares = natural - whole
    return (shares.logsumexp(2) - math.log(shares.shape[2])) / math.log(2)


def recent_mass(
    query: torch.Tensor, keys: torch.Tensor, padding_mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """The logarithm, base 2, of each query head's mass over tokens that are attended anyway.

    Parameters
    ----------
    query : Tensor (batch, query_heads, 1, head_dim)
    keys : Tensor (batch, kv_heads, tokens, head_dim)
    padding_mask : Tensor (batch, tokens) of bool, or None
    scale : float
        Factor on q.k before the softmax.

    Returns
    -------
    Tensor (batch, query_heads) of float32
        -inf for a row without such tokens.
    """
    grouped = query.float().unflatten(1, (keys.shape[1], -1)).squeeze(3)
    logits = grouped @ keys.float().transpose(-1, -2) * (scale / math.log(2))
    if padding_mask is not None:
        logits = logits.masked_fill(~padding_mask[:, None, None], -torch.inf)
    return (logits * math.log(2)).logsumexp(-1).flatten(1) / math.log(2)


def keep_mass(
    scores: torch.Tensor, mass: float, least: int, padding_mask: torch.Tensor | None, sinks: int = 0
) -> torch.Tensor:
    """Scores with -inf for the blocks that are not needed to hold a share of the attention mass.

    Parameters
    ----------
    scores : Tensor (batch, kv_heads, blocks) of float32
        As :func:`mean_share` returns them.
    mass : float
        The share in (0, 1): the blocks left out, those with the smallest shares, hold at most ``1 - mass``.
    least : int
        Blocks that are kept in any case: sinks, then the best ones.
    padding_mask : Tensor (batch, blocks) of bool, or None
        False for blocks of only padding.
    sinks : int
        Leading real blocks of a row that are always kept; their mass counts.

    Returns
    -------
    Tensor (batch, kv_heads, blocks) of float32

    Examples
    --------
    >>> import torch
    >>> from scout_hf.selection.group_mass import keep_mass
    >>> keep_mass(torch.tensor([[[0.5, 0.3, 0.2]]]).log2(), 0.75, 1, None).isfinite()
    tensor([[[ True,  True, False]]])
    """
    if padding_mask is not None:
        scores = scores.masked_fill(~padding_mask[:, None], -torch.inf)
    if padding_mask is None:
        leading = torch.arange(scores.shape[2], dtype=torch.int64, device=scores.device) < sinks
    else:
        leading = (padding_mask & (padding_mask.cumsum(1) <= sinks))[:, None]
    order = scores.masked_fill(leading, torch.inf).argsort(dim=2)
    shares = scores.gather(2, order).exp2()
    # NaN is never left out.
    needless = shares.cumsum(2) <= 1 - mass
    if least:
        needless[:, :, -least:] = False
    left_out = torch.zeros_like(needless).scatter(2, order, needless) & ~leading
    return scores.masked_fill(left_out, -torch.inf)
