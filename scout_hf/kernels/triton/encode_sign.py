"""Encode sign codes: centre, balance and rotate keys on tensor cores, then keep one or two bits and a token's scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.bf16_split import bf16_split
from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.padding_tokens import as_bytes, valid_or_first
from scout_hf.kernels.triton.support import dot, next_power_of_2

# Tokens per program, and channels per pass: at head_dim 256 both pieces of the rotation take 32 KiB of shared memory.
TOKENS, CHANNELS = 64, 32
# As in scout_hf.selection.sign, which stands above this module.
LEVEL_STEP = 0.9957


@triton.jit
def _packed(bits, column, TOKENS: tl.constexpr, COLUMNS: tl.constexpr):
    """Bits (TOKENS, COLUMNS) to bytes (TOKENS, COLUMNS / 8), the first bit lowest."""
    placed = bits.to(tl.int32) << (column % 8)[None, :]
    return tl.sum(tl.reshape(placed, (TOKENS, COLUMNS // 8, 8)), 2).to(tl.uint8)


@prepared
@triton.jit(do_not_specialize=["mask_b", "codes_b", "codes_h", "blocks"])
def _encode_sign(
    keys, padding_mask, mean, divisor, rotation, codes,
    keys_b, keys_h, keys_n, keys_t, mask_b, mask_n, mask_t, codes_b, codes_h,
    blocks,
    SIZE: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, EACH: tl.constexpr,
    CHANNELS: tl.constexpr, BITS: tl.constexpr, LEVEL_STEP: tl.constexpr, HAS_PADDING_MASK: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    # A program covers several whole blocks, or a part of one.
    PIECES: tl.constexpr = SIZE // EACH
    BLOCKS: tl.constexpr = TOKENS // EACH
    start = tl.program_id(0) // PIECES * BLOCKS
    line = tl.arange(0, TOKENS)
    block = start + line // EACH
    token = tl.program_id(0) % PIECES * EACH + line % EACH
    real = block < blocks
    place = token
    if HAS_PADDING_MASK:
        padding_mask += row * mask_b
        every = start + tl.arange(0, BLOCKS)
        inside = tl.arange(0, SIZE)
        marks = padding_mask + every.to(tl.int64)[:, None] * mask_n + inside[None, :] * mask_t
        marks = tl.load(marks, mask=(every < blocks)[:, None], other=0)
        first = tl.min(tl.where(marks != 0, inside[None, :], SIZE), 1)
        first = tl.reshape(tl.broadcast_to(first[:, None], (BLOCKS, EACH)), (TOKENS,))
        padding_mask += tl.where(real, block, 0).to(tl.int64) * mask_n
        place = valid_or_first(padding_mask, mask_t, token, first, SIZE)

    constants = (row * tl.num_programs(1) + head) * DIM
    keys += row * keys_b + head * keys_h
    keys += (block.to(tl.int64) * keys_n + place * keys_t)[:, None]
    column = tl.arange(0, COLUMNS)
    turned = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for start in range(0, DIM, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        within = channel < DIM
        centre = tl.load(mean + constants + channel, mask=within, other=0.0)
        spread = tl.load(divisor + constants + channel, mask=within, other=1.0)
        key = tl.load(keys + channel[None, :], mask=real[:, None] & within[None, :], other=0.0).to(tl.float32)
        high, low = bf16_split((key - centre[None, :]) / spread[None, :])
        turn = rotation + channel[:, None] * DIM + column[None, :]
        main, rest = bf16_split(tl.load(turn, mask=within[:, None] & (column < DIM)[None, :], other=0.0))
        # The product of both remainders is below the precision that matters.
        turned += dot(high, rest) + dot(low, main)
        turned += dot(high, main)

    ROWS: tl.constexpr = BITS * DIM // 8
    codes += row * codes_b + head * codes_h + block.to(tl.int64) * (SIZE * (ROWS + 1)) + token
    byte = tl.arange(0, COLUMNS // 8)
    into, mask = codes[:, None] + byte[None, :] * SIZE, real[:, None] & (byte < DIM // 8)[None, :]
    square = tl.sum(turned * turned, 1)
    if BITS == 1:
        tl.store(into, _packed(turned >= 0.0, column, TOKENS, COLUMNS), mask=mask)
        scale = square / tl.maximum(tl.sum(tl.abs(turned), 1), 1e-30)
    else:
        # Of the levels, half integers from -1.5 to 1.5, the nearest, as an integer that is 1.5 larger.
        step = tl.maximum(LEVEL_STEP * tl.sqrt(square / DIM), 1e-30)
        level = tl.minimum(tl.maximum(tl.floor(turned / step[:, None]), -2.0), 1.0) + 2.0
        tl.store(into, _packed(level >= 2.0, column, TOKENS, COLUMNS), mask=mask)
        second = _packed((level == 1.0) | (level == 3.0), column, TOKENS, COLUMNS)
        tl.store(into + DIM // 8 * SIZE, second, mask=mask)
        products = tl.where((column < DIM)[None, :], turned * (level - 1.5), 0.0)
        scale = square / tl.maximum(tl.sum(products, 1), 1e-30)
    # Four bits of exponent and four of mantissa, rounded to nearest; NaN becomes large.
    scale = tl.where(scale < 3e38, scale, 3e38)
    bits = (scale.to(tl.int32, bitcast=True) + (1 << 18) - (120 << 23)) >> 19
    tl.store(codes + ROWS * SIZE, tl.minimum(tl.maximum(bits, 1), 255).to(tl.uint8), mask=real)


def encode_sign(
    keys: torch.Tensor,
    padding_mask: torch.Tensor | None,
    mean: torch.Tensor,
    divisor: torch.Tensor,
    rotation: torch.Tensor,
    bits: int = 1,
) -> torch.Tensor:
    """Codes of :class:`scout_hf.selection.SignCode`, uint8 (batch, kv_heads, blocks, size * (bits * head_dim / 8 + 1)).

    Rotated values have an error of about 2**-16 of the token's scale, so a value close to a limit may get either level.

    Parameters
    ----------
    keys, padding_mask
        As in :func:`scout_hf.kernels.triton.encode_bounds.encode_bounds`; the block size must be a power of two.
    mean, divisor : Tensor (batch, kv_heads, head_dim) of float32
    rotation : Tensor (head_dim, head_dim) of float32
    bits : int
        1 or 2.
    """
    batch, heads, blocks, size, dim = keys.shape
    codes = torch.empty((batch, heads, blocks, size * (bits * dim // 8 + 1)), dtype=torch.uint8, device=keys.device)
    marks, strides = as_bytes(padding_mask)
    each, columns = min(size, TOKENS), max(16, next_power_of_2(dim))
    _encode_sign.launch(
        (-(-(blocks * (size // each)) // (TOKENS // each)), heads, batch),
        keys, marks, mean.contiguous(), divisor.contiguous(), rotation.contiguous(), codes,
        *keys.stride()[:4], *strides, *codes.stride()[:2],
        blocks,
        SIZE=size, DIM=dim, COLUMNS=columns, TOKENS=TOKENS, EACH=each,
        CHANNELS=CHANNELS, BITS=bits, LEVEL_STEP=LEVEL_STEP, HAS_PADDING_MASK=padding_mask is not None,
        num_warps=8 if columns > 128 else 4, num_stages=2,
    )  # fmt: skip
    return codes
