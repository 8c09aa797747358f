"""Append one token at a position that only the device knows, for captured steps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.support import next_power_of_2


@prepared
@triton.jit
def _append(
    new_keys, new_values, keys, values, length, blocks,
    new_b, new_h, values_new_b, values_new_h, keys_b, keys_h, keys_t,
    KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, head = (tl.program_id(0) // KV_HEADS).to(tl.int64), (tl.program_id(0) % KV_HEADS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    place = tl.load(length) - 1 - tl.load(blocks) * BLOCK
    target = row * keys_b + head * keys_h + place * keys_t + column
    key = tl.load(new_keys + row * new_b + head * new_h + column, mask=column < DIM)
    value = tl.load(new_values + row * values_new_b + head * values_new_h + column, mask=column < DIM)
    tl.store(keys + target, key.to(keys.dtype.element_ty), mask=column < DIM)
    tl.store(values + target, value.to(values.dtype.element_ty), mask=column < DIM)


def append_token(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    blocks: torch.Tensor,
    block_size: int,
) -> None:
    """Write the newest token of every row into the tail.

    Parameters
    ----------
    new_keys, new_values : Tensor (batch, kv_heads, 1, head_dim)
    keys, values : Tensor (batch, kv_heads, capacity, head_dim)
        The tail, both with the same strides, the last 1.
    length, blocks : Tensor (1,) of int32
        Tokens per row, the new one included; whole blocks of ``block_size`` tokens before the tail.

    Examples
    --------
    >>> new = torch.ones(1, 2, 1, 64, device="cuda")  # doctest: +SKIP
    >>> keys, values = torch.zeros(2, 1, 2, 96, 64, device="cuda")  # doctest: +SKIP
    >>> length, blocks = (torch.tensor([n], dtype=torch.int32, device="cuda") for n in (70, 2))  # doctest: +SKIP
    >>> append_token(new, new, keys, values, length, blocks, 32)  # doctest: +SKIP
    >>> keys[0, 0, :, 0].nonzero().flatten().tolist()  # doctest: +SKIP
    [5]
    """
    batch, heads, _, dim = new_keys.shape
    _append.launch(
        (batch * heads,),
        new_keys, new_values, keys, values, length, blocks,
        *new_keys.stride()[:2], *new_values.stride()[:2], *keys.stride()[:3],
        heads, block_size, dim, next_power_of_2(dim),
        num_warps=1,
    )  # fmt: skip
