"""Merge partial attention results by their LSE, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.bf16_split import rounded
from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.support import next_power_of_2


@prepared
@triton.jit
def _merge(
    parts, logs, more, more_logs, sinks, out, lse,
    parts_h, more_h, count, heads,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    HAS_MORE: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    place = head.to(tl.int64)
    part, column = tl.arange(0, PARTS), tl.arange(0, COLUMNS)
    within = column < DIM
    part_logs = tl.load(logs + place * parts_h + part, mask=part < count, other=float("-inf"))
    e_max = tl.max(part_logs, 0)
    if HAS_MORE:
        more_log = tl.load(more_logs + place)
        e_max = tl.maximum(e_max, more_log)
    if HAS_SINKS:
        sink = tl.load(sinks + head % heads).to(tl.float32)
        e_max = tl.maximum(e_max, sink)
    base = tl.where(e_max == float("-inf"), 0.0, e_max)
    weights = tl.exp(part_logs - base)
    e_sum = tl.sum(weights, 0)
    # The output of a part without tokens may be uninitialised.
    mask = (part_logs != float("-inf"))[:, None] & within[None, :]
    values = tl.load(parts + (place * parts_h + part)[:, None] * DIM + column[None, :], mask=mask, other=0.0)
    acc = tl.sum(weights[:, None] * values, 0)
    if HAS_MORE:
        more_logs = tl.zeros([COLUMNS], tl.float32) + more_log
        mask = (more_logs != float("-inf")) & within
        values = tl.load(more + place * more_h + column, mask=mask, other=0.0).to(tl.float32)
        acc += tl.exp(more_logs - base) * values
        e_sum += tl.exp(more_log - base)
    if HAS_SINKS:
        e_sum += tl.exp(sink - base)
    empty = e_sum == 0.0
    e_sum = tl.where(empty, 1.0, e_sum)
    tl.store(out + place * DIM + column, rounded(acc / e_sum, out.dtype.element_ty), mask=within)
    tl.store(lse + place, tl.where(empty, float("-inf"), tl.log(e_sum) + base))


def merge(
    parts: torch.Tensor,
    logs: torch.Tensor,
    more: torch.Tensor | None = None,
    more_logs: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint parts.

    Parameters
    ----------
    parts : Tensor (batch, query_heads, parts, head_dim) of float32, contiguous
        Partial outputs; ignored where the LSE is -inf.
    logs : Tensor (batch, query_heads, parts) of float32, contiguous
        Natural LSE of each part.
    more, more_logs : Tensor (batch, query_heads, 1, head_dim), (batch, query_heads, 1), or None
        Output and LSE of one more part (CPU attention), possibly in pinned host memory; contiguous, LSE in float32.
    sinks : Tensor (query_heads,) or None
        Logits of attention sinks, which add to the softmax denominator only (gpt-oss).
    dtype : torch.dtype
        Of the output.

    Returns
    -------
    out : Tensor (batch, query_heads, 1, head_dim)
    lse : Tensor (batch, query_heads, 1) of float32

    Examples
    --------
    >>> query = torch.randn(1, 8, 1, 64, device="cuda")  # doctest: +SKIP
    >>> keys, values = torch.randn(2, 1, 2, 4, 32, 64, device="cuda")  # doctest: +SKIP
    >>> out, lse = merge(*attend_blocks(query, keys, values, 64**-0.5, num_kv_splits=2))  # doctest: +SKIP
    >>> out.shape, lse.shape  # doctest: +SKIP
    (torch.Size([1, 8, 1, 64]), torch.Size([1, 8, 1]))
    """
    batch, heads, count, dim = parts.shape
    out = torch.empty((batch, heads, 1, dim), dtype=dtype, device=parts.device)
    lse = torch.empty((batch, heads, 1), dtype=torch.float32, device=parts.device)
    _merge.launch(
        (batch * heads,),
        parts, logs, *((parts, logs) if more is None else (more, more_logs)), logs if sinks is None else sinks,
        out, lse, logs.stride(1), dim, count, heads,
        dim, next_power_of_2(dim), next_power_of_2(max(count, 2)),
        more is not None, sinks is not None,
        num_warps=4,
    )  # fmt: skip
    return out, lse
