"""Channel-wise bounds of blocks, in the dtype of the keys or quantised to a grid."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.padding_tokens import as_bytes, first_valid, valid_or_first
from scout_hf.kernels.triton.support import next_power_of_2

# Elements of keys per program: 32 for each of its 128 threads, once for upper and once for lower bounds.
TILE_ELEMENTS = 4096


@triton.jit
def on_grid(bound, middle, step, UP: tl.constexpr, MOST: tl.constexpr):
    """Quantise bounds to grid steps from the middle, rounded outwards, as int32; 0 for NaN.

    The division must be IEEE-exact: an approximate one could round an integer to its neighbour.
    """
    steps = tl.div_rn(bound - middle, step)
    steps = tl.ceil(steps) if UP else tl.floor(steps)
    steps = tl.where(steps == steps, steps, 0.0)
    return tl.minimum(tl.maximum(steps, -1.0 - MOST), 1.0 * MOST).to(tl.int32)


@triton.jit
def _finite(bound):
    return tl.where(tl.abs(bound) < float("inf"), bound, 0.0)


@prepared
@triton.jit(do_not_specialize=["mask_b", "codes_b", "codes_h"])
def _encode_bounds(
    keys, padding_mask, middle, step, codes,
    keys_b, keys_h, keys_n, keys_t, mask_b, mask_n, mask_t, codes_b, codes_h,
    SIZE: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    HAS_PADDING_MASK: tl.constexpr, HAS_GRID: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    block, head, row = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2).to(tl.int64)
    keys += row * keys_b + head.to(tl.int64) * keys_h + block * keys_n
    column = tl.arange(0, COLUMNS)
    within = column < DIM
    first = 0
    if HAS_PADDING_MASK:
        padding_mask += row * mask_b + block * mask_n
        first = first_valid(padding_mask, mask_t, SIZE, PADDED)
    highest = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    lowest = tl.full([ROWS, COLUMNS], float("inf"), tl.float32)
    for start in range(0, SIZE, ROWS):
        # Repeat the last token behind the end.
        token = tl.minimum(start + tl.arange(0, ROWS), SIZE - 1)
        if HAS_PADDING_MASK:
            token = valid_or_first(padding_mask, mask_t, token, first, SIZE)
        tile = tl.load(keys + token[:, None] * keys_t + column[None, :], mask=within[None, :], other=0.0)
        tile = tile.to(tl.float32)
        highest = tl.maximum(highest, tile, propagate_nan=tl.PropagateNan.ALL)
        lowest = tl.minimum(lowest, tile)
    # Triton's minima and reductions skip NaN; the torch reference propagates it into both bounds.
    wrong = tl.max((highest != highest).to(tl.int32), 0) > 0
    high = tl.where(wrong, float("nan"), tl.max(tl.where(highest == highest, highest, float("-inf")), 0))
    low = tl.where(wrong, float("nan"), tl.min(lowest, 0))
    codes += row * codes_b + head * codes_h + block * (2 * DIM) + column
    if HAS_GRID:
        constants = (row * tl.num_programs(1) + head) * DIM + column
        centre = tl.load(middle + constants, mask=within, other=0.0)
        width = tl.load(step + constants, mask=within, other=1.0)
        tl.store(codes, on_grid(high, centre, width, True, MOST).to(tl.int8), mask=within)
        tl.store(codes + DIM, on_grid(low, centre, width, False, MOST).to(tl.int8), mask=within)
    else:
        if HAS_PADDING_MASK:
            # A block of only padding has bounds of zero.
            some = first < SIZE
            high, low = tl.where(some, _finite(high), 0.0), tl.where(some, _finite(low), 0.0)
        tl.store(codes, high.to(codes.dtype.element_ty), mask=within)
        tl.store(codes + DIM, low.to(codes.dtype.element_ty), mask=within)


def encode_bounds(
    keys: torch.Tensor,
    padding_mask: torch.Tensor | None,
    middle: torch.Tensor | None = None,
    step: torch.Tensor | None = None,
    bits: int = 8,
) -> torch.Tensor:
    """Upper bounds of all channels of a block, then its lower bounds: (batch, kv_heads, blocks, 2 * head_dim).

    Parameters
    ----------
    keys : Tensor (batch, kv_heads, blocks, block_size, head_dim) of bfloat16, float16 or float32
        The last stride must be 1.
    padding_mask : Tensor (batch, blocks, block_size) of bool, or None
        False for padding.
    middle, step : Tensor (batch, kv_heads, 1, head_dim) of float32, or None
        Grid per channel: bounds are then integers of ``bits`` bits in int8; None for bounds in the dtype of the keys.
    """
    batch, heads, blocks, size, dim = keys.shape
    grid = middle is not None and step is not None
    middle, step = (None if part is None else part.contiguous() for part in (middle, step))
    codes = torch.empty((batch, heads, blocks, 2 * dim), dtype=torch.int8 if grid else keys.dtype, device=keys.device)
    marks, strides = as_bytes(padding_mask)
    columns, padded = next_power_of_2(dim), next_power_of_2(size)
    _encode_bounds.launch(
        (blocks, heads, batch),
        keys, marks, middle, step, codes,
        *keys.stride()[:4], *strides, *codes.stride()[:2],
        SIZE=size, PADDED=padded, DIM=dim, COLUMNS=columns, ROWS=min(padded, max(1, TILE_ELEMENTS // columns)),
        HAS_PADDING_MASK=padding_mask is not None, HAS_GRID=grid, MOST=2 ** (bits - 1) - 1,
    )  # fmt: skip
    return codes
