"""Score codes that are rows of numbers: the maximum over a block's rows of the dot product with a weight vector."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.support import next_power_of_2

# Storage of numbers: floats, int8, or two 4-bit integers per byte, the lower half first.
FLOATS, BYTES, NIBBLES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Elements of codes per load: 64 for each of the program's 128 threads, to stay in registers.
TILE_ELEMENTS = 8192


@triton.jit
def _whole(bits, TOP: tl.constexpr):
    """Convert signed integers, with sign bit ``TOP`` and no bits above, to float32.

    With that bit flipped and put below the exponent of 2**23, they are the mantissa of a float, up to a constant. That
    is exact and takes two fast instructions; a conversion instruction is slow on most GPUs.
    """
    return (bits ^ (0x4B000000 + TOP)).to(tl.float32, bitcast=True) - (8388608.0 + TOP)


@prepared
@triton.jit(do_not_specialize=["scores_b", "scores_h", "blocks"])
def _score_dots(
    query, codes, count, scores,
    query_b, query_h, codes_b, codes_h, codes_n, scores_b, scores_h,
    blocks,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, EACH: tl.constexpr, TILE: tl.constexpr,
    KIND: tl.constexpr, HAS_COUNT: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    known = blocks
    if HAS_COUNT:
        known = tl.minimum(blocks, tl.load(count))
    query += row * query_b + head * query_h
    first = tl.program_id(0) * TILE
    line, column = tl.arange(0, TILE * EACH), tl.arange(0, COLUMNS)
    part, within = line % EACH, column < WIDTH
    real = (first + line // EACH < known) & (part < PARTS)
    codes += row * codes_b + head * codes_h + first.to(tl.int64) * codes_n
    place = codes + (line // EACH * codes_n + part * WIDTH)[:, None] + column[None, :]
    numbers = tl.load(place, mask=real[:, None] & within[None, :], other=0)
    if KIND == NIBBLES:
        even = tl.load(query + 2 * column, mask=within, other=0.0).to(tl.float32)
        odd = tl.load(query + 2 * column + 1, mask=within, other=0.0).to(tl.float32)
        pair = numbers.to(tl.int32)
        # The upper half is not shifted, so its value is 16 times as large.
        products = _whole(pair & 15, 8) * even[None, :] + _whole(pair & 240, 128) * (odd * 0.0625)[None, :]
    else:
        weights = tl.load(query + column, mask=within, other=0.0).to(tl.float32)
        if KIND == BYTES:
            products = _whole(numbers.to(tl.int32), 128) * weights[None, :]
        else:
            products = numbers.to(tl.float32) * weights[None, :]
    product = tl.where(real, tl.sum(products, 1), float("-inf"))
    score = tl.max(tl.reshape(product, (TILE, EACH)), 1)
    block = first + tl.arange(0, TILE)
    scores += row * scores_b + head * scores_h
    tl.store(scores + block, score, mask=block < blocks)


def score_dots(
    query: torch.Tensor, codes: torch.Tensor, scores: torch.Tensor, count: torch.Tensor | None = None,
    halves: bool = False,
) -> None:  # fmt: skip
    """The maximum over each block's rows of the dot product with the weights.

    Parameters
    ----------
    query : Tensor (batch, kv_heads, 1, n) of bfloat16, float16 or float32
        Weights.
    codes : Tensor (batch, kv_heads, blocks, rows * n), or with ``halves`` (batch, kv_heads, blocks, rows * n / 2)
        Floats or int8; with ``halves``, bytes (uint8 or int8) of two signed 4-bit integers, the lower half first. The
        last stride must be 1.
    scores, count
        As in :func:`scout_hf.kernels.triton.score_minmax.score_minmax`.
    halves : bool
    """
    batch, heads, blocks, code = codes.shape
    width = query.shape[3] // (1 + halves)
    parts, columns = code // width, next_power_of_2(width)
    each = next_power_of_2(parts)
    tile = max(1, TILE_ELEMENTS // (each * columns))
    kind = NIBBLES if halves else FLOATS if codes.is_floating_point() else BYTES
    codes = codes if codes.is_floating_point() else codes.view(torch.uint8)
    _score_dots.launch(
        (-(-blocks // tile), heads, batch),
        query, codes, count, scores,
        *query.stride()[:2], *codes.stride()[:3], *scores.stride()[:2],
        blocks,
        WIDTH=width, COLUMNS=columns, PARTS=parts, EACH=each, TILE=tile, KIND=kind, HAS_COUNT=count is not None,
    )  # fmt: skip
