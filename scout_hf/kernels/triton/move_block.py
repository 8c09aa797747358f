"""Move the tail's oldest block to its host page and into an empty slot, by numbers that only the device knows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.recall import COPY_ELEMENTS
from scout_hf.kernels.triton.support import next_power_of_2


@triton.jit
def _shift(part, SIZE: tl.constexpr, REST: tl.constexpr, STEP: tl.constexpr):
    """Move the elements behind the first ``SIZE`` to the front; loads of a step come before stores that overwrite."""
    for first in range(0, REST, STEP):
        at = first + tl.arange(0, STEP)
        moved = tl.load(part + SIZE + at, mask=at < REST)
        tl.debug_barrier()
        tl.store(part + at, moved, mask=at < REST)


# What grows with the context must not make another kernel.
@prepared
@triton.jit(do_not_specialize=["pages_b", "slot_of_b", "slot_of_h", "capacity"])
def _move(
    keys, values, blocks, pages, ids, slot_of, slot_keys, slot_values,
    keys_b, keys_h, pages_b, slot_of_b, slot_of_h, slots_b, slots_h, slots_n, capacity,
    KV_HEADS: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr, REST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    here = tl.program_id(0)
    row, head = (here // KV_HEADS).to(tl.int64), (here % KV_HEADS).to(tl.int64)
    block = tl.load(blocks)
    slot = tl.arange(0, SLOTS)
    held = tl.load(ids + here.to(tl.int64) * capacity + slot, mask=slot < capacity, other=0)
    free = tl.min(tl.where(held < 0, slot, capacity), 0)
    if free < capacity:
        tl.store(ids + here.to(tl.int64) * capacity + free, block)
        tl.store(slot_of + row * slot_of_b + head * slot_of_h + block, free)
    keys += row * keys_b + head * keys_h
    values += row * keys_b + head * keys_h
    copied = tl.where(free < capacity, SIZE, 0)
    into = row * slots_b + head * slots_h + free.to(tl.int64) * slots_n
    # A page holds keys, then values, head by head. The alignment hint must follow the sum, see recall.py.
    page = tl.multiple_of(tl.load(pages + row * pages_b + block).to(keys.dtype) + head * (2 * SIZE), 16)
    for first in range(0, SIZE, STEP):
        at = first + tl.arange(0, STEP)
        k, v = tl.load(keys + at, mask=at < SIZE), tl.load(values + at, mask=at < SIZE)
        tl.store(page + at, k, mask=at < SIZE)
        tl.store(page + SIZE + at, v, mask=at < SIZE)
        tl.store(slot_keys + into + at, k, mask=at < copied)
        tl.store(slot_values + into + at, v, mask=at < copied)
    tl.debug_barrier()
    _shift(keys, SIZE, REST, STEP)
    _shift(values, SIZE, REST, STEP)


def move_block(
    keys: torch.Tensor,
    values: torch.Tensor,
    blocks: torch.Tensor,
    pages: torch.Tensor,
    ids: torch.Tensor,
    slot_of: torch.Tensor,
    slot_keys: torch.Tensor,
    slot_values: torch.Tensor,
) -> None:
    """Move the tail's oldest block, of every row and KV head, to the host; the rest of the tail moves to the front.

    Parameters
    ----------
    keys, values : Tensor (batch, kv_heads, n * block_size, head_dim)
        The tail, both with the same strides, contiguous for a row and head; its last block is undefined afterwards.
    blocks : Tensor (1,) of int32
        Number of that block.
    pages : Tensor (batch, blocks) of int64
        Addresses of host pages, as for :func:`scout_hf.kernels.triton.recall.copy_blocks`.
    ids : Tensor (batch, kv_heads, slots) of int32, contiguous
        The block in each slot, negative for none. The block is also copied into the first empty slot, if there is one.
    slot_of : Tensor (batch, kv_heads, more than that block) of int32
        The slot of each block; changed with ``ids``.
    slot_keys, slot_values : Tensor (batch, kv_heads, slots, block_size, head_dim)
        The slots; blocks are contiguous, both tensors have the same strides.

    Examples
    --------
    >>> tail = torch.arange(4.0, device="cuda").repeat_interleave(32)[:, None].expand(2, 1, 2, -1, 64)  # doctest: +SKIP
    >>> keys, values = tail.contiguous()  # of four blocks: 0, 1, 2, 3  # doctest: +SKIP
    >>> page = torch.zeros(2, 2, 32, 64).pin_memory()  # doctest: +SKIP
    >>> pages = torch.tensor([[0, 0, page.data_ptr()]], device="cuda")  # doctest: +SKIP
    >>> slots = torch.zeros(2, 1, 2, 1, 32, 64, device="cuda")  # doctest: +SKIP
    >>> ids, slot_of = torch.full((2, 1, 2, 8), -1, dtype=torch.int32, device="cuda")  # doctest: +SKIP
    >>> block = torch.tensor([2], dtype=torch.int32, device="cuda")  # doctest: +SKIP
    >>> move_block(keys, values, block, pages, ids[..., :1].contiguous(), slot_of, *slots)  # doctest: +SKIP
    >>> keys[0, 0, ::32, 0].tolist()[:3], slot_of[0, 0].tolist()  # doctest: +SKIP
    ([1.0, 2.0, 3.0], [-1, -1, 0, -1, -1, -1, -1, -1])
    """
    batch, heads, capacity = ids.shape
    block_size, dim = slot_keys.shape[3:]
    size = block_size * dim
    _move.launch(
        (batch * heads,),
        keys, values, blocks, pages, ids, slot_of, slot_keys, slot_values,
        *keys.stride()[:2], pages.stride(0), *slot_of.stride()[:2], *slot_keys.stride()[:3], capacity,
        heads, next_power_of_2(max(capacity, 2)), size, keys.shape[2] * dim - size,
        min(COPY_ELEMENTS, next_power_of_2(size)),
        num_warps=4,
    )  # fmt: skip
