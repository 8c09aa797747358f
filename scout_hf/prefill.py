"""Attention of a whole prompt with the model's own kernel, if possible without a mask over queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

QUERY_CHUNK = 256


def prefill(
    stock: Callable[..., tuple[Any, ...]],
    name: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    """Causal attention of a whole prompt over itself.

    Parameters
    ----------
    stock : callable
        The model's previous attention function.
    name : str
        Its name. Eager attention is not causal without a mask; flash kernels take no mask over queries and keys.
    module, query, keys, values, kwargs
        Arguments of an attention function of transformers; query is (batch, query_heads, tokens, head_dim), of all
        tokens or of the last ones.
    mask : Tensor (batch, tokens) of bool, or None
        Padding mask, False for padding.

    Returns
    -------
    Tensor (batch, tokens of the query, query_heads, head_dim)
        Undefined but finite at padding.
    """
    whole = query.shape[2] == keys.shape[2]
    if name != "eager" and mask is None and whole:
        return stock(module, query, keys, values, None, **kwargs)[0]
    kwargs.pop("position_ids", None)
    starts = None if mask is None or not whole else left_padding(mask)
    if name == "eager":
        return _masked(stock, False, module, query, keys, values, mask, kwargs)
    if starts is None or mask is None:
        return _masked(sdpa_attention_forward, True, module, query, keys, values, mask, kwargs)
    out: torch.Tensor | None = None
    for start in starts[starts < mask.shape[1]].unique().tolist():
        rows = (starts == start).nonzero().squeeze(1)
        real = [part[rows, :, start:] for part in (query, keys, values)]
        part = stock(module, *real, None, **kwargs)[0]
        if out is None:
            # In the dtype of the kernel's answer: autocast may change it.
            out = part.new_zeros((query.shape[0], query.shape[2], *part.shape[2:]))
        out[rows, start:] = part
    # Only padding: there is nothing to run the kernel on.
    return query.new_zeros((*query.shape[:3], values.shape[3])).transpose(1, 2) if out is None else out


def left_padding(mask: torch.Tensor) -> torch.Tensor | None:
    """Number of padding tokens at the start of each row, (batch,); None if padding is elsewhere too."""
    starts = (~mask).sum(-1)
    expected = torch.arange(mask.shape[1], dtype=torch.int64, device=mask.device) >= starts[:, None]
    return starts if bool((mask == expected).all()) else None


def _masked(
    stock: Callable[..., tuple[Any, ...]],
    takes_bool_mask: bool,
    module: torch.nn.Module,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    tokens = keys.shape[2]
    begin = tokens - query.shape[2]
    order = torch.arange(tokens, dtype=torch.int64, device=query.device)
    parts = []
    for first in range(begin, tokens, QUERY_CHUNK):
        last = min(first + QUERY_CHUNK, tokens)
        allowed = (order[first:last, None] >= order[None, :last])[None, None]
        if mask is not None:
            allowed = allowed & mask[:, None, None, :last]
            # A padding query attends to itself: its output is not used, but must be finite.
            itself = order[first:last, None] == order[None, :last]
            allowed = allowed | (itself & ~allowed.any(-1, keepdim=True))
        if not takes_bool_mask:
            lowest = torch.finfo(query.dtype).min
            allowed = torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~allowed, lowest)
        span = (query[:, :, first - begin : last - begin], keys[:, :, :last], values[:, :, :last])
        parts.append(stock(module, *span, allowed, **kwargs)[0])
    return torch.cat(parts, dim=1)
