"""How large a prompt's queries are in each channel, for digests that are fitted."""

from __future__ import annotations

import torch

# The last queries resemble those of decoding most; a few hundred are enough.
POWER_QUERIES = 512


def power_of(query: torch.Tensor, kv_heads: int, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean square of a prompt's last queries, (batch, kv_heads, head_dim) of float32, over the GQA group.

    Parameters
    ----------
    query : Tensor (batch, query_heads, tokens, head_dim)
    kv_heads : int
    mask : Tensor (batch, tokens so far) of bool, or None
        False for padding.
    """
    recent = query[:, :, -POWER_QUERIES:].float().square()
    if mask is not None:
        real = mask[:, None, -recent.shape[2] :, None].to(recent.device)
        share = real.float().mean(2, keepdim=True).clamp(min=1e-6)
        recent = recent.masked_fill(~real, 0.0) / share
    return recent.mean(2).unflatten(1, (kv_heads, -1)).mean(2)
