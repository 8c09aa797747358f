"""Attention with torch, on CPU and GPU, that also returns the log-sum-exp (LSE) for merging."""

from __future__ import annotations

import torch

from scout_hf.errors import UnsupportedInputError
from scout_hf.fusion import Partial, empty_like

# float32 scores per chunk: 256 MiB.
MOST_SCORES = 1 << 26

_gpu_flash = torch.ops.aten._scaled_dot_product_flash_attention
_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# Before torch 2.9 the op has no GQA support: it reads past the end of the keys.
_GROUPS_HEADS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    allowed: torch.Tensor | None = None,
    causal: bool = False,
) -> Partial:
    """Softmax attention of every query over the given keys.

    Parameters
    ----------
    query : Tensor (batch, query_heads, queries, head_dim)
    keys, values : Tensor (batch, kv_heads, tokens, head_dim)
        Query heads are a multiple of KV heads (GQA).
    scale : float
        Factor on q.k.
    softcap : float or None
        ``cap * tanh(score / cap)`` before masking (Gemma2).
    allowed : Tensor of bool, broadcastable to (batch, kv_heads, queries, tokens), or None
        Keys that may be attended; None for all.
    causal : bool
        Query ``i`` sees keys up to ``i``; queries and keys are the same tokens.

    Returns
    -------
    Partial
        Output, (batch, query_heads, queries, head_dim), in the dtype of the query or wider; natural LSE, (batch,
        query_heads, queries). A query without allowed keys gets 0 and -inf.

    Raises
    ------
    UnsupportedInputError
        If ``allowed`` does not broadcast.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.kernels import attend
    >>> query, keys = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 5, 8)
    >>> result = attend(query, keys, keys, scale=8**-0.5)
    >>> result.out.shape, result.lse.shape
    (torch.Size([1, 4, 1, 8]), torch.Size([1, 4, 1]))
    """
    if not keys.shape[2]:
        return empty_like(query)
    if allowed is not None:
        _check_mask(allowed, (keys.shape[0], keys.shape[1], query.shape[2], keys.shape[2]))
    if query.device.type == "cpu" and softcap is None:
        return _flash_on_cpu(query, keys, values, scale, allowed, causal)
    if _flash_serves(query, keys, softcap, allowed):
        return _flash_on_gpu(query, keys, values, scale, causal)
    return _by_products(query, keys, values, scale, softcap, allowed, causal)


def _check_mask(allowed: torch.Tensor, most: tuple[int, ...]) -> None:
    if allowed.dim() != 4 or any(size not in (1, full) for size, full in zip(allowed.shape, most)):
        raise UnsupportedInputError(
            f"allowed has shape {tuple(allowed.shape)}, which does not broadcast to (batch, kv_heads, queries, tokens) "
            f"= {most}; all query heads of a KV head share a mask: try (batch, 1, 1, tokens)"
        )


def alike_where_empty(query: torch.Tensor, allowed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A query and a mask with which a query without allowed tokens attends to all of them alike.

    That is what masks of large negative numbers give, which stock adds to the scores.

    Parameters
    ----------
    query : Tensor (batch, query_heads, queries, head_dim)
    allowed : Tensor (batch, 1 or kv_heads, queries, tokens) of bool

    Returns
    -------
    query, allowed : Tensor
        In the same shapes.
    """
    empty = ~allowed.any(-1, keepdim=True)
    of_heads = empty.repeat_interleave(query.shape[1] // empty.shape[1], dim=1)
    return query.masked_fill(of_heads, 0.0), allowed | empty


def fold_group(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Turn the query heads of a GQA group into queries: (batch, kv_heads, group * queries, head_dim)."""
    batch, heads, queries, dim = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads * queries, dim)


def unfold_group(partial: Partial, query: torch.Tensor) -> Partial:
    """Undo :func:`fold_group` on a result; ``query`` is the unfolded query."""
    return Partial(partial.out.reshape(query.shape), partial.lse.reshape(query.shape[:3]))


def _flash_on_cpu(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    allowed: torch.Tensor | None,
    causal: bool,
) -> Partial:
    # Folding the group into the queries reads each key once for the whole group; a causal or per-query mask counts
    # queries by their position, so there the op's own head grouping is used.
    query, keys, values = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, keys, values))
    folded = not causal and (allowed is None or allowed.shape[-2] == 1)
    given = fold_group(query, keys.shape[1]) if folded else query
    bias, groups = None, 1 if folded else query.shape[1] // keys.shape[1]
    if groups > 1 and not _GROUPS_HEADS:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    if allowed is not None:
        if allowed.shape[1] != 1 and groups > 1:
            allowed = allowed.repeat_interleave(groups, dim=1)
        bias = torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~allowed, -torch.inf)
        bias = bias.expand(given.shape[0], -1, -1, -1)
    out, lse = _cpu_flash(given, keys, values, 0.0, causal, attn_mask=bias, scale=scale)
    if allowed is not None:
        # The op returns an LSE of 0 for a query without keys.
        lse = lse.masked_fill(~allowed.any(-1).expand(lse.shape), -torch.inf)
    return unfold_group(Partial(out, lse), query) if folded else Partial(out, lse)


def _flash_serves(query: torch.Tensor, keys: torch.Tensor, softcap: float | None, allowed: torch.Tensor | None) -> bool:
    """Whether torch's CUDA flash kernel supports this: no mask, head_dim a multiple of 8."""
    half, dim = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    plain = softcap is None and allowed is None and query.shape[2] > 1
    recent = query.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return recent and half and plain and dim % 8 == 0 and dim <= 256


def _flash_on_gpu(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, causal: bool) -> Partial:
    groups = query.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    out, lse, *_ = _gpu_flash(query, keys, values, 0.0, causal, False, scale=scale)
    return Partial(out, lse[:, :, : query.shape[2]].float())


def _by_products(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float | None,
    allowed: torch.Tensor | None,
    causal: bool,
) -> Partial:
    """Attention by matrix products, in chunks of queries to bound the memory of the scores."""
    queries, tokens = query.shape[2], keys.shape[2]
    step = max(1, MOST_SCORES // max(1, query.shape[0] * query.shape[1] * tokens))
    parts = []
    for first in range(0, queries, step):
        part = allowed
        if allowed is not None and allowed.shape[-2] > 1:
            part = allowed[..., first : first + step, :]
        if causal:
            order = torch.arange(tokens, dtype=torch.int64, device=query.device)
            seen = order[None, :] <= order[first : first + step, None]
            part = seen[None, None] if part is None else part & seen
        parts.append(_products(query[:, :, first : first + step], keys, values, scale, softcap, part))
    if len(parts) == 1:
        return parts[0]
    return Partial(*(torch.cat(each, dim=2) for each in zip(*parts)))


def _products(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float | None,
    allowed: torch.Tensor | None,
) -> Partial:
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, heads, queries, dim = query.shape
    grouped = query.to(wide).reshape(batch, keys.shape[1], -1, queries, dim)
    scores = torch.matmul(grouped, keys.to(wide).unsqueeze(2).transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if allowed is not None:
        scores.masked_fill_(~allowed.unsqueeze(2), -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.where(lse.unsqueeze(-1) == -torch.inf, 0.0, torch.exp(scores - lse.unsqueeze(-1)))
    out = torch.matmul(weights, values.to(wide).unsqueeze(2))
    return Partial(out.reshape(query.shape[:-1] + out.shape[-1:]), lse.reshape(batch, heads, queries))
