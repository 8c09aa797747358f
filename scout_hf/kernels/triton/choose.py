"""Top-k blocks of every list, and those of them that are not resident, without a sort and without a host sync.

The k-th best score is found by radix: the bit patterns of the scores, mapped to 32-bit integers in the same order, are
counted by their highest 8 bits, then those that share these by the next 8, and so on. Among equal scores the first
blocks are chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.launch import prepared

CHUNK_BLOCKS = 2048


class Choice(NamedTuple):
    """Result of :func:`choose`.

    is_chosen : Tensor (batch, kv_heads, blocks) of uint8
        1 for a chosen block.
    missing : Tensor (batch, kv_heads, n) of int32
        Chosen blocks that are not resident, ascending, packed to the front; undefined behind them.
    missing_counts, chosen_counts : Tensor (batch, kv_heads) of int32
        Entries of ``missing``; number of all chosen blocks.
    """

    is_chosen: torch.Tensor
    missing: torch.Tensor
    missing_counts: torch.Tensor
    chosen_counts: torch.Tensor


@triton.jit
def _ordered(scores):
    """Map float32 to uint32 such that the order is the same."""
    bits = scores.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _rank(scores, padding_mask, leading, first, lane, open_blocks, sinks, HAS_PADDING_MASK: tl.constexpr):
    """The rank key of each block of a chunk that begins with block ``first``, and whether it may be chosen."""
    # Compared are places in the chunk: LLVM would make block numbers 64 bits wide, as addresses are.
    real = lane < open_blocks - first
    if HAS_PADDING_MASK:
        real = real & (tl.load(padding_mask + first + lane, mask=real, other=0) != 0)
        sink = real & (tl.load(leading + first + lane, mask=real, other=sinks + 1) <= sinks)
    else:
        sink = real & (lane < sinks - first)
    score = tl.load(scores + first + lane, mask=real, other=float("-inf"))
    may = real & ((score > float("-inf")) | sink | (score != score))
    return tl.where(sink, tl.full([], 0xFFFFFFFF, tl.uint32), _ordered(score)), may


# What grows with the context must not make another kernel.
_GROWING = [
    "scores_b", "scores_h", "slots_b", "slots_h", "mask_b", "is_chosen_b", "is_chosen_h", "missing_b", "missing_h",
    "blocks", "count", "sinks",
]  # fmt: skip


@prepared
@triton.jit(do_not_specialize=_GROWING)
def _choose(
    scores, slots, padding_mask, leading, counts, open_count, is_chosen, missing, missing_counts, chosen_counts,
    scores_b, scores_h, slots_b, slots_h, mask_b, is_chosen_b, is_chosen_h, missing_b, missing_h,
    blocks, count, sinks,
    KV_HEADS: tl.constexpr, CHUNK: tl.constexpr, HAS_PADDING_MASK: tl.constexpr, HAS_COUNTS: tl.constexpr,
    HAS_OPEN: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    scores += row.to(tl.int64) * scores_b + head * scores_h
    slots += row.to(tl.int64) * slots_b + head * slots_h
    is_chosen += row.to(tl.int64) * is_chosen_b + head * is_chosen_h
    missing += row * missing_b + head * missing_h
    padding_mask += row * mask_b
    leading += row * mask_b
    if HAS_COUNTS:
        count = tl.load(counts + row).to(tl.int32)
    open_blocks = tl.minimum(tl.load(open_count), blocks) if HAS_OPEN else blocks
    sinks = tl.minimum(sinks, count)
    chunks = tl.cdiv(open_blocks, CHUNK)
    lane = tl.arange(0, CHUNK)

    key, above, take = tl.zeros([], tl.uint32), tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    digit = tl.arange(0, 256)
    for level in range(4):
        held = tl.zeros([256], tl.int32)
        for chunk in range(chunks):
            rank, real = _rank(scores, padding_mask, leading, chunk * CHUNK, lane, open_blocks, sinks, HAS_PADDING_MASK)
            prefix = rank >> (24 - 8 * level)
            held += tl.histogram((prefix & 255).to(tl.int32), 256, mask=real & (prefix >> 8 == key))
        reach = tl.cumsum(held, 0, reverse=True)
        take = tl.where(level == 0, tl.minimum(count, tl.max(reach, 0)), take)
        # The largest digit that at least ``take`` blocks reach, and the blocks above it.
        best = tl.max(tl.where(above + reach >= take, digit, 0), 0)
        above += tl.sum(tl.where(digit > best, held, 0), 0)
        key = (key << 8) | best.to(tl.uint32)

    ties, found = take - above, 0
    for chunk in range(tl.cdiv(blocks, CHUNK)):
        first = chunk * CHUNK
        rank, real = _rank(scores, padding_mask, leading, first, lane, open_blocks, sinks, HAS_PADDING_MASK)
        equal = real & (rank == key)
        order = tl.cumsum(equal.to(tl.int32), 0)
        chosen = (real & (rank > key)) | (equal & (order <= ties))
        ties -= tl.sum(equal.to(tl.int32), 0)
        tl.store(is_chosen + first + lane, chosen.to(tl.uint8), mask=lane < blocks - first)
        absent = chosen & (tl.load(slots + first + lane, mask=chosen, other=0) < 0)
        place = found + tl.cumsum(absent.to(tl.int32), 0) - 1
        tl.store(missing + place, first + lane, mask=absent)
        found += tl.sum(absent.to(tl.int32), 0)
    tl.store(missing_counts + tl.program_id(0), found)
    tl.store(chosen_counts + tl.program_id(0), take)


def choose(
    scores: torch.Tensor,
    count: int | torch.Tensor,
    sinks: int,
    padding_mask: torch.Tensor | None,
    slots: torch.Tensor,
    most: int,
    open_count: torch.Tensor | None = None,
    out: Choice | None = None,
) -> Choice:
    """Choose the top-k blocks, and find those of them that are not resident.

    Parameters
    ----------
    scores : Tensor (batch, kv_heads, blocks) of float32
        Larger is better; -inf is never chosen.
    count : int or Tensor (batch,)
        Blocks to choose (k), for all rows or for each.
    sinks : int
        Leading real blocks of a row that are always chosen; they count towards ``count``.
    padding_mask : Tensor (batch, blocks) of bool, or None
        False for blocks of only padding; None if there are none.
    slots : Tensor (batch, kv_heads, at least blocks) of int32
        Slot of each block, negative for one that is not resident.
    most : int
        Capacity of a list: the largest ``count``.
    open_count : Tensor (1,) of int32, or None
        Number of leading blocks that may be chosen; None for all of ``scores``.
    out : Choice or None
        Output tensors; they may be in pinned host memory.

    Examples
    --------
    >>> scores = torch.tensor([[[0.1, 0.9, 0.5, 0.7]]], device="cuda")  # doctest: +SKIP
    >>> slots = torch.tensor([[[-1, 0, -1, -1]]], dtype=torch.int32, device="cuda")  # doctest: +SKIP
    >>> choice = choose(scores, 3, 1, None, slots, 3)  # doctest: +SKIP
    >>> choice.is_chosen.tolist(), choice.missing_counts.tolist(), choice.missing[0, 0, :2].tolist()  # doctest: +SKIP
    ([[[1, 1, 0, 1]]], [[2]], [0, 3])
    """
    batch, heads, blocks = scores.shape
    device = scores.device
    if out is None:
        is_chosen = torch.empty((batch, heads, blocks), dtype=torch.uint8, device=device)
        missing = torch.empty((batch, heads, most), dtype=torch.int32, device=device)
        out = Choice(is_chosen, missing, *torch.empty((2, batch, heads), dtype=torch.int32, device=device))
    leading = None if padding_mask is None else padding_mask.cumsum(1, dtype=torch.int32)
    if padding_mask is not None:
        padding_mask = padding_mask.contiguous()
    counts = count if isinstance(count, torch.Tensor) else None
    _choose.launch(
        (batch * heads,),
        scores, slots, *((scores, scores) if padding_mask is None else (padding_mask, leading)),
        scores if counts is None else counts, scores if open_count is None else open_count, *out,
        *scores.stride()[:2], *slots.stride()[:2], 0 if padding_mask is None else padding_mask.stride(0),
        *out.is_chosen.stride()[:2], *out.missing.stride()[:2],
        blocks, most if counts is not None else count, sinks,
        heads, CHUNK_BLOCKS, padding_mask is not None, counts is not None, open_count is not None,
        num_warps=8,
    )  # fmt: skip
    return out
