"""From the attention mass of each query head to one score per KV head."""

from __future__ import annotations

import math

import torch


def mean_share(masses: torch.Tensor, kv_heads: int, padding_mask: torch.Tensor | None) -> torch.Tensor:
    """The logarithm of a block's share of the attention mass, as the mean over the query heads of a GQA group.

    A sum of logarithms would let heads that find a block unimportant outvote the one that needs it.

    Parameters
    ----------
    masses : Tensor (batch, query_heads, blocks) of float32
        Logarithms, base 2; -inf for a block that is not there.
    kv_heads : int
    padding_mask : Tensor (batch, blocks) of bool, or None
        False for blocks of only padding, which take no share; None if there are none.

    Returns
    -------
    Tensor (batch, kv_heads, blocks) of float32
        Base 2. Powers of two of real blocks add up to 1. Undefined for blocks of only padding.

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
    shares = natural.log_softmax(-1)
    # In logarithms to the end: a share may be too small for a float.
    return (shares.logsumexp(2) - math.log(shares.shape[2])) / math.log(2)
