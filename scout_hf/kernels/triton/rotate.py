"""Rotary embedding of a decode step's query and keys, in one launch in place of torch's ten."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.bf16_split import rounded
from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.support import next_power_of_2


@prepared
@triton.jit
def _rotate(
    query, keys, cos, sin, query_out, keys_out, query_b, query_h, keys_b, keys_h, cos_b, sin_b,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, head = (tl.program_id(0) // (HEADS + KV_HEADS)).to(tl.int64), tl.program_id(0) % (HEADS + KV_HEADS)
    column = tl.arange(0, COLUMNS)
    within = column < HALF
    if head < HEADS:
        source, target = query + row * query_b + head * query_h, query_out + (row * HEADS + head) * (2 * HALF)
    else:
        head -= HEADS
        source, target = keys + row * keys_b + head * keys_h, keys_out + (row * KV_HEADS + head) * (2 * HALF)
    first = tl.load(source + column, mask=within, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + column, mask=within, other=0.0).to(tl.float32)
    cos += row * cos_b + column
    sin += row * sin_b + column
    cos_first, cos_second = tl.load(cos, mask=within, other=0.0), tl.load(cos + HALF, mask=within, other=0.0)
    sin_first, sin_second = tl.load(sin, mask=within, other=0.0), tl.load(sin + HALF, mask=within, other=0.0)
    KIND: tl.constexpr = query.dtype.element_ty
    # Products are rounded as torch's are, but for one that the compiler may add unrounded.
    low = rounded(first * cos_first.to(tl.float32), KIND).to(tl.float32)
    low -= rounded(second * sin_first.to(tl.float32), KIND).to(tl.float32)
    high = rounded(second * cos_second.to(tl.float32), KIND).to(tl.float32)
    high += rounded(first * sin_second.to(tl.float32), KIND).to(tl.float32)
    tl.store(target + column, rounded(low, KIND), mask=within)
    tl.store(target + HALF + column, rounded(high, KIND), mask=within)


def rotate(
    query: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate each channel of the first half of a head with that of the second half.

    Parameters
    ----------
    query, keys : Tensor (batch, heads, 1, head_dim)
        bfloat16, float16 or float32; the last stride must be 1. Keys may have no heads.
    cos, sin : Tensor (1 or batch, 1, head_dim)
        In the same dtype, the last stride 1.

    Returns
    -------
    tuple of Tensor (batch, heads, 1, head_dim)
        Query and keys, contiguous.

    Examples
    --------
    >>> query, keys = torch.randn(8, 40, 1, 128, device="cuda").split([32, 8], 1)  # doctest: +SKIP
    >>> cos, sin = torch.zeros(1, 1, 128, device="cuda"), torch.ones(1, 1, 128, device="cuda")  # doctest: +SKIP
    >>> torch.equal(rotate(query, keys, cos, sin)[0][..., 64:], query[..., :64])  # doctest: +SKIP
    True
    """
    (batch, heads, _, dim), kv_heads = query.shape, keys.shape[1]
    query_out = torch.empty((batch, heads, 1, dim), dtype=query.dtype, device=query.device)
    keys_out = torch.empty((batch, kv_heads, 1, dim), dtype=query.dtype, device=query.device)
    # A tensor without elements may have no address: the kernel does not read it.
    given, into = (keys, keys_out) if kv_heads else (query, query_out)
    shared = (0, 0) if cos.shape[0] == 1 else (cos.stride(0), sin.stride(0))
    _rotate.launch(
        (batch * (heads + kv_heads),),
        query, given, cos, sin, query_out, into, *query.stride()[:2], *given.stride()[:2], *shared,
        heads, kv_heads, dim // 2, next_power_of_2(dim // 2),
        num_warps=1,
    )  # fmt: skip
    return query_out, keys_out
