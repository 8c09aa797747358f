"""4-bit grid bounds of every ``sub`` tokens, two per byte."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.encode_bounds import on_grid
from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.padding_tokens import as_bytes, first_valid, valid_or_first
from scout_hf.kernels.triton.support import next_power_of_2

# Upper (or lower) bounds per program: 32 for each of its 128 threads.
TILE_ELEMENTS = 4096


@triton.jit
def _packed(numbers, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pack int32 (PARTS, COLUMNS) into bytes (PARTS, COLUMNS / 2), the first of two neighbours in the lower half."""
    even, odd = tl.split(tl.reshape(numbers, (PARTS, COLUMNS // 2, 2)))
    return ((even & 15) | ((odd & 15) << 4)).to(tl.uint8)


@prepared
@triton.jit(do_not_specialize=["mask_b", "codes_b", "codes_h"])
def _encode_parts(
    keys, padding_mask, middle, step, codes,
    keys_b, keys_h, keys_n, keys_t, mask_b, mask_n, mask_t, codes_b, codes_h,
    SIZE: tl.constexpr, PADDED: tl.constexpr, SUB: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr, HAS_PADDING_MASK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    block, head, row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys += row * keys_b + head.to(tl.int64) * keys_h + block * keys_n
    codes += row * codes_b + head * codes_h + block * (SIZE // SUB * DIM)
    column, pair = tl.arange(0, COLUMNS), tl.arange(0, COLUMNS // 2)
    within = column < DIM
    constants = (row * tl.num_programs(1) + head) * DIM + column
    centre = tl.load(middle + constants, mask=within, other=0.0)[None, :]
    width = tl.load(step + constants, mask=within, other=1.0)[None, :]
    first = 0
    if HAS_PADDING_MASK:
        padding_mask += row * mask_b + block * mask_n
        first = first_valid(padding_mask, mask_t, SIZE, PADDED)
    for start in range(0, SIZE // SUB, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = part < SIZE // SUB
        high = tl.full([PARTS, COLUMNS], float("-inf"), tl.float32)
        low = tl.full([PARTS, COLUMNS], float("inf"), tl.float32)
        # A loop over tokens, so that every bound stays in one thread.
        for offset in tl.static_range(SUB):
            token = tl.where(inside, part, 0) * SUB + offset
            if HAS_PADDING_MASK:
                token = valid_or_first(padding_mask, mask_t, token, first, SIZE)
            key = tl.load(keys + token[:, None] * keys_t + column[None, :], mask=within[None, :], other=0.0)
            high = tl.maximum(high, key.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
            low = tl.minimum(low, key.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
        mask = inside[:, None] & (pair < DIM // 2)[None, :]
        place = codes + part[:, None] * DIM + pair[None, :]
        tl.store(place, _packed(on_grid(high, centre, width, True, MOST), PARTS, COLUMNS), mask=mask)
        tl.store(place + DIM // 2, _packed(on_grid(low, centre, width, False, MOST), PARTS, COLUMNS), mask=mask)


def encode_parts(
    keys: torch.Tensor, padding_mask: torch.Tensor | None, middle: torch.Tensor, step: torch.Tensor, sub: int
) -> torch.Tensor:
    """Upper bounds, then lower ones, of every ``sub`` tokens: uint8 (batch, kv_heads, blocks, size / sub * head_dim).

    Parameters
    ----------
    keys, padding_mask, middle, step
        As in :func:`scout_hf.kernels.triton.encode_bounds.encode_bounds`; head_dim must be even.
    sub : int
        A power of two that divides the block size.
    """
    batch, heads, blocks, size, dim = keys.shape
    codes = torch.empty((batch, heads, blocks, size // sub * dim), dtype=torch.uint8, device=keys.device)
    marks, strides = as_bytes(padding_mask)
    columns, padded = next_power_of_2(dim), next_power_of_2(size)
    parts = min(padded // sub, max(1, TILE_ELEMENTS // columns))
    _encode_parts.launch(
        (blocks, heads, batch),
        keys, marks, middle.contiguous(), step.contiguous(), codes,
        *keys.stride()[:4], *strides, *codes.stride()[:2],
        SIZE=size, PADDED=padded, SUB=sub, DIM=dim, COLUMNS=columns, PARTS=parts,
        HAS_PADDING_MASK=padding_mask is not None, MOST=7,
    )  # fmt: skip
    return codes
