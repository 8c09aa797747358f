"""Recall on the device: reassign slots, copy blocks from pinned host memory, adopt new blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.choose import Choice
from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.support import next_power_of_2

COPY_ELEMENTS = 4096
# Programs of a copy: with 16 KiB each on its way they fill the link, and most multiprocessors stay free.
MOST_COPIES = 64


class Moves(NamedTuple):
    """Planned copies of blocks into slots.

    slots, blocks : Tensor (batch, kv_heads, n) of int32
        Target slot and block of each copy, packed to the front; undefined behind them.
    counts : Tensor (batch, kv_heads) of int32
        Entries of each list.
    """

    slots: torch.Tensor
    blocks: torch.Tensor
    counts: torch.Tensor


# What grows with the context must not make another kernel; where parts of one allocation begin depends on sizes too.
@prepared
@triton.jit(
    do_not_specialize=[
        "is_chosen_b", "is_chosen_h", "missing_b", "missing_h", "slot_of_b", "slot_of_h", "lists", "most", "capacity",
    ],
    do_not_specialize_on_alignment=["chosen_counts", "share_at", "blocks"],
)  # fmt: skip
def _plan(
    ids, slot_of, is_chosen, missing, missing_counts, chosen_counts, share_at, slots, blocks, counts, tally,
    is_chosen_b, is_chosen_h, missing_b, missing_h, slot_of_b, slot_of_h,
    capacity, lists, most, share,
    KV_HEADS: tl.constexpr, SLOTS: tl.constexpr, LISTS: tl.constexpr, HAS_SHARE: tl.constexpr,
    HAS_TALLY: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(0)
    row, head = here // KV_HEADS, here % KV_HEADS
    ids += here.to(tl.int64) * capacity
    slot_of += row.to(tl.int64) * slot_of_b + head * slot_of_h
    is_chosen += row.to(tl.int64) * is_chosen_b + head * is_chosen_h
    missing += row * missing_b + head * missing_h
    # All lists may be in host memory: none of these loads waits for another, and sums over lists come after them.
    every = tl.arange(0, LISTS)
    absent = tl.load(missing_counts + every, mask=every < lists, other=0)
    chosen = tl.load(chosen_counts + every, mask=every < lists, other=0)
    if HAS_SHARE:
        share = tl.load(share_at)

    slot = tl.arange(0, SLOTS)
    held = tl.load(ids + slot, mask=slot < capacity, other=0)
    empty = (slot < capacity) & (held < 0)
    kept = tl.load(is_chosen + held, mask=(slot < capacity) & (held >= 0), other=1) != 0
    leaves = (slot < capacity) & (held >= 0) & ~kept
    # Empty slots first, then slots of blocks that are not chosen now: counts of both in one number.
    ranks = tl.cumsum((empty.to(tl.int64) << 32) + leaves.to(tl.int64), 0)
    empties, leaving = (ranks >> 32).to(tl.int32), ranks.to(tl.int32)
    free = tl.max(empties, 0)
    turn = tl.where(empty, empties, free + leaving) - 1
    block = tl.load(missing + turn, mask=(empty | leaves) & (turn < most), other=0)

    moves = tl.minimum(tl.sum(tl.where(every == here, absent, 0), 0), free + tl.max(leaving, 0))
    # The threshold applies to the sum over all lists of the layer.
    absent, chosen = tl.sum(absent, 0), tl.sum(chosen, 0)
    due = (absent > 0) & (absent.to(tl.float32) >= share * chosen.to(tl.float32))
    moves = tl.where(due, tl.minimum(moves, most), 0)
    moving = (empty | leaves) & (turn < moves)
    tl.store(slot_of + held, tl.full([SLOTS], -1, tl.int32), mask=moving & (held >= 0))
    tl.debug_barrier()
    tl.store(slot_of + block, slot, mask=moving)
    tl.store(ids + slot, block, mask=moving)
    tl.store(slots + here * most + turn, slot, mask=moving)
    tl.store(blocks + here * most + turn, block, mask=moving)
    tl.store(counts + here, moves)
    if HAS_TALLY:
        tl.atomic_add(tally, moves.to(tl.int64), sem="relaxed")


def plan_recall(
    ids: torch.Tensor,
    slot_of: torch.Tensor,
    choice: Choice,
    share: float | torch.Tensor = 0.0,
    tally: torch.Tensor | None = None,
) -> Moves:
    """Assign slots of blocks that are not chosen to missing ones; :func:`copy_blocks` then copies the data.

    Parameters
    ----------
    ids : Tensor (batch, kv_heads, slots) of int32, contiguous
        The block in each slot, negative for none; changed.
    slot_of : Tensor (batch, kv_heads, blocks) of int32
        The slot of each block, negative for none; changed.
    choice : Choice
        The chosen blocks of the step; its lists may be in pinned host memory.
    share : float or Tensor (1,) of float32
        Threshold: nothing moves if missing blocks are a smaller share of the chosen ones, over the whole layer.
    tally : Tensor (1,) of int64, or None
        Incremented by the number of blocks that move.

    Examples
    --------
    >>> scores = torch.tensor([[[0.1, 0.9, 0.5, 0.7]]], device="cuda")  # doctest: +SKIP
    >>> ids = torch.tensor([[[0, 1]]], dtype=torch.int32, device="cuda")  # slots hold blocks 0 and 1  # doctest: +SKIP
    >>> slot_of = torch.tensor([[[0, 1, -1, -1]]], dtype=torch.int32, device="cuda")  # doctest: +SKIP
    >>> moves = plan_recall(ids, slot_of, choose(scores, 2, 0, None, slot_of, 2))  # doctest: +SKIP
    >>> ids.tolist(), slot_of.tolist(), moves.counts.tolist()  # block 3 replaces block 0  # doctest: +SKIP
    ([[[3, 1]]], [[[-1, 1, -1, 0]]], [[1]])
    """
    batch, heads, capacity = ids.shape
    most, at = choice.missing.shape[2], isinstance(share, torch.Tensor)
    slots, blocks = torch.empty((2, batch, heads, most), dtype=torch.int32, device=ids.device).unbind()
    out = Moves(slots, blocks, torch.empty((batch, heads), dtype=torch.int32, device=ids.device))
    _plan.launch(
        (batch * heads,),
        ids, slot_of, *choice, share if at else ids, *out, ids if tally is None else tally,
        *choice.is_chosen.stride()[:2], *choice.missing.stride()[:2], *slot_of.stride()[:2],
        capacity, batch * heads, most, 0.0 if at else share,
        heads, next_power_of_2(max(capacity, 2)), next_power_of_2(max(batch * heads, 2)), at,
        tally is not None,
        num_warps=4,
    )  # fmt: skip
    return out


@prepared
@triton.jit(do_not_specialize=["pages_b", "lists", "moves"])
def _copy(
    pages, slots, blocks, counts, keys, values,
    pages_b, keys_b, keys_h, keys_n, lists, moves,
    SIZE: tl.constexpr, KV_HEADS: tl.constexpr, LISTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    kind = keys.dtype
    every = tl.arange(0, LISTS)
    ends = tl.cumsum(tl.load(counts + every, mask=every < lists, other=0), 0)
    # Moves of all lists one after another: every program makes as many, however they are spread over lists.
    for number in range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
        before = ends <= number
        here = tl.sum(before.to(tl.int32), 0)
        move = here * moves + number - tl.max(tl.where(before, ends, 0), 0)
        row, head = here // KV_HEADS, here % KV_HEADS
        block, slot = tl.load(blocks + move), tl.load(slots + move).to(tl.int64)
        target = row.to(tl.int64) * keys_b + head.to(tl.int64) * keys_h + slot * keys_n
        # A page holds keys, then values, head by head.
        # The alignment hint must follow the sum: only there does it allow 16-byte loads.
        source = tl.multiple_of(tl.load(pages + row * pages_b + block).to(kind) + head * (2 * SIZE), 16)
        for first in range(0, SIZE, STEP):
            at = first + tl.arange(0, STEP)
            # Both cross the link at once: a load does not pass a store.
            k, v = tl.load(source + at, mask=at < SIZE), tl.load(source + SIZE + at, mask=at < SIZE)
            tl.store(keys + target + at, k, mask=at < SIZE)
            tl.store(values + target + at, v, mask=at < SIZE)


def copy_blocks(pages: torch.Tensor, moves: Moves, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Copy blocks from host pages into their slots.

    Parameters
    ----------
    pages : Tensor (batch, blocks) of int64, on the device
        Addresses of pages of a ``PagedKV``, (kv_heads, 2, block_size, head_dim) each, in pinned memory. The kernel
        reads them over the link directly, so that thousands of small copies cost one launch.
    moves : Moves
    keys, values : Tensor (batch, kv_heads, slots, block_size, head_dim)
        The slots, in the dtype of the pages; blocks are contiguous, both tensors have the same strides.

    Examples
    --------
    >>> pages = torch.ones(3, 2, 2, 32, 64).pin_memory()  # 3 pages of 2 KV heads  # doctest: +SKIP
    >>> addresses = torch.tensor([[page.data_ptr() for page in pages]], device="cuda")  # doctest: +SKIP
    >>> keys, values = torch.zeros(2, 1, 2, 2, 32, 64, device="cuda")  # doctest: +SKIP
    >>> copy_blocks(addresses, run_of_blocks(1, 2, 1, 2, keys.device), keys, values)  # blocks 1 and 2  # doctest: +SKIP
    >>> bool((keys == 1).all())  # doctest: +SKIP
    True
    """
    batch, heads, _, size, dim = keys.shape
    most = moves.blocks.shape[2]
    _copy.launch(
        (min(batch * heads * most, MOST_COPIES),),
        pages, moves.slots, moves.blocks, moves.counts, keys, values,
        pages.stride(0), *keys.stride()[:3], batch * heads, most,
        size * dim, heads, next_power_of_2(max(batch * heads, 2)),
        min(COPY_ELEMENTS, next_power_of_2(size * dim)),
        num_warps=4,
    )  # fmt: skip


def run_of_blocks(batch: int, heads: int, first: int, count: int, device: torch.device) -> Moves:
    """Moves of blocks ``first`` to ``first + count - 1`` of every row and KV head into slots 0, 1, ...

    Examples
    --------
    >>> moves = run_of_blocks(1, 2, first=5, count=3, device=torch.device("cuda"))  # doctest: +SKIP
    >>> moves.slots[0, 0].tolist(), moves.blocks[0, 0].tolist(), moves.counts.tolist()  # doctest: +SKIP
    ([0, 1, 2], [5, 6, 7], [[3, 3]])
    """
    slots = torch.arange(count, dtype=torch.int32, device=device).expand(batch, heads, count).contiguous()
    return Moves(slots, slots + first, torch.full((batch, heads), count, dtype=torch.int32, device=device))


@prepared
@triton.jit(do_not_specialize=["slot_of_b", "slot_of_h", "capacity", "first"])
def _adopt(
    ids, slot_of, new_keys, new_values, keys, values,
    slot_of_b, slot_of_h, new_b, new_h, new_t, keys_b, keys_h, keys_n,
    capacity, first,
    KV_HEADS: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(0)
    row, head = (here // KV_HEADS).to(tl.int64), (here % KV_HEADS).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    held = tl.load(ids + here.to(tl.int64) * capacity + slot, mask=slot < capacity, other=0)
    free = tl.min(tl.where(held < 0, slot, capacity), 0)
    if free < capacity:
        tl.store(ids + here.to(tl.int64) * capacity + free, first)
        tl.store(slot_of + row * slot_of_b + head * slot_of_h + first, free)
        source, target = row * new_b + head * new_h, row * keys_b + head * keys_h + free.to(tl.int64) * keys_n
        for begin in range(0, SIZE, STEP):
            at = begin + tl.arange(0, STEP)
            place = source + at // DIM * new_t + at % DIM
            tl.store(keys + target + at, tl.load(new_keys + place, mask=at < SIZE), mask=at < SIZE)
            tl.store(values + target + at, tl.load(new_values + place, mask=at < SIZE), mask=at < SIZE)


def adopt_block(
    first: int,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    ids: torch.Tensor,
    slot_of: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Copy block ``first`` into an empty slot of every row and KV head that has one; only the device knows which.

    ``new_keys`` and ``new_values`` are (batch, kv_heads, block_size, head_dim) with the same strides, the last 1. Other
    parameters as in :func:`plan_recall` and :func:`copy_blocks`.

    Examples
    --------
    >>> block = torch.ones(1, 2, 32, 64, device="cuda")  # doctest: +SKIP
    >>> keys, values = torch.zeros(2, 1, 2, 4, 32, 64, device="cuda")  # doctest: +SKIP
    >>> ids = torch.tensor([[[7, -1, -1, -1]] * 2], dtype=torch.int32, device="cuda")  # doctest: +SKIP
    >>> slot_of = torch.full((1, 2, 16), -1, dtype=torch.int32, device="cuda")  # doctest: +SKIP
    >>> adopt_block(8, block, block, ids, slot_of, keys, values)  # doctest: +SKIP
    >>> ids[0, 0].tolist(), int(slot_of[0, 0, 8])  # doctest: +SKIP
    ([7, 8, -1, -1], 1)
    """
    batch, heads, capacity = ids.shape
    size, dim = new_keys.shape[2:]
    _adopt.launch(
        (batch * heads,),
        ids, slot_of, new_keys, new_values, keys, values,
        *slot_of.stride()[:2], *new_keys.stride()[:3], *keys.stride()[:3],
        capacity, first,
        heads, next_power_of_2(max(capacity, 2)), size * dim, dim,
        min(COPY_ELEMENTS, next_power_of_2(size * dim)),
        num_warps=4,
    )  # fmt: skip
