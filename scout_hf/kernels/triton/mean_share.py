"""Of the masses of a GQA group's query heads, one score per block: the logarithm of their mean share, base 2."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.support import next_power_of_2

ELEMENTS = 4096
"""Masses that a program holds at a time."""


@triton.jit
def _log_of_sum(top, total):
    """log2 of ``total``, relative to ``top``; -inf for a sum of nothing. NaN stays NaN."""
    empty = total == 0.0
    return tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))


@triton.jit
def _finite(top):
    """``top``, or 0 where it is -inf, so that nothing is subtracted from infinity."""
    return tl.where(top == float("-inf"), 0.0, top)


@prepared
@triton.jit(do_not_specialize=["masses_b", "masses_h", "shares_b", "shares_h", "mask_b", "blocks"])
def _mean_share(
    masses, padding_mask, recent, shares,
    masses_b, masses_h, mask_b, shares_b, shares_h,
    blocks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    HAS_PADDING_MASK: tl.constexpr, HAS_RECENT: tl.constexpr,
):  # fmt: skip
    row, head = (tl.program_id(0) // KV_HEADS).to(tl.int64), (tl.program_id(0) % KV_HEADS).to(tl.int64)
    member, step = tl.arange(0, ROWS), tl.arange(0, CHUNK)
    masses += row * masses_b + head * GROUP * masses_h
    inside = member < GROUP

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, blocks, CHUNK):
        block = first + step
        real = block < blocks
        if HAS_PADDING_MASK:
            real = real & (tl.load(padding_mask + row * mask_b + block, mask=real, other=0) != 0)
        mask = inside[:, None] & real[None, :]
        mass = tl.load(masses + member[:, None] * masses_h + block[None, :], mask=mask, other=float("-inf"))
        higher = tl.maximum(top, tl.max(mass, 1))
        base = _finite(higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(mass - base[:, None]), 1)
        top = higher
    if HAS_RECENT:
        at = row * KV_HEADS * GROUP + head * GROUP + member
        newer = tl.load(recent + at, mask=inside, other=float("-inf"))
        higher = tl.maximum(top, newer)
        base = _finite(higher)
        total = total * tl.exp2(top - base) + tl.exp2(newer - base)
        top = higher
    whole = _finite(_log_of_sum(top, total))

    for first in range(0, blocks, CHUNK):
        block = first + step
        mask = inside[:, None] & (block < blocks)[None, :]
        mass = tl.load(masses + member[:, None] * masses_h + block[None, :], mask=mask, other=float("-inf"))
        share = mass - whole[:, None]
        most = tl.max(share, 0)
        mean = _log_of_sum(most, tl.sum(tl.exp2(share - _finite(most)[None, :]), 0) / GROUP)
        tl.store(shares + row * shares_b + head * shares_h + block, mean, mask=block < blocks)


def mean_share(
    masses: torch.Tensor, kv_heads: int, padding_mask: torch.Tensor | None, recent: torch.Tensor | None = None
) -> torch.Tensor:
    """As :func:`scout_hf.selection.group_mass.mean_share`, in one launch that reads the masses twice.

    Blocks of only padding take no share; their own scores are undefined. The last stride of ``masses`` must be 1.

    Examples
    --------
    >>> masses = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]], device="cuda")  # doctest: +SKIP
    >>> mean_share(masses, kv_heads=1, padding_mask=None).tolist()  # doctest: +SKIP
    [[[-1.0, -1.0]]]
    """
    batch, heads, blocks = masses.shape
    group = heads // kv_heads
    shares = torch.empty((batch, kv_heads, blocks), dtype=torch.float32, device=masses.device)
    if not shares.numel():
        return shares
    rows = next_power_of_2(group)
    _mean_share.launch(
        (batch * kv_heads,),
        masses, masses if padding_mask is None else padding_mask,
        masses if recent is None else recent.contiguous(), shares,
        *masses.stride()[:2], 0 if padding_mask is None else padding_mask.stride(0), *shares.stride()[:2],
        blocks,
        kv_heads, group, rows, max(16, ELEMENTS // rows),
        padding_mask is not None, recent is not None,
        num_warps=8,
    )  # fmt: skip
    return shares
