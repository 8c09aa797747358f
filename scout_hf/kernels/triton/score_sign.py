"""Score sign codes: products of signs and queries on tensor cores, then the LSE of each block and query head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.bf16_split import bf16_split
from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.support import MIN_ROWS, dot, next_power_of_2

# Tokens per warp: small blocks then need no reduction across warps.
WARP_TOKENS = 64
# Most tiles per program, which reads its query once; fewer while the programs do not fill the GPU.
MOST_TILES, ENOUGH_PROGRAMS = 16, 2048


@triton.jit
def _plane(query, query_h, line, BIT: tl.constexpr, DIM: tl.constexpr, BYTES: tl.constexpr, GROUP: tl.constexpr,
           HALF: tl.constexpr):  # fmt: skip
    """The query channels of bit ``i`` of every byte: as summands, and as scaled factors.

    Bit ``i`` of a byte, shifted into the exponent of a bfloat16, is the number 2**(2**i - 127). The query is scaled by
    the inverse, up to 2**-60 that keeps both in range.
    """
    member, byte = line % HALF, tl.arange(0, BYTES)
    mask = (member < GROUP)[:, None] & (byte < DIM // 8)[None, :]
    asked = tl.load(query + member[:, None] * query_h + byte[None, :] * 8 + BIT, mask=mask, other=0.0)
    high, low = bf16_split(asked.to(tl.float32))
    pieces = tl.where((line < HALF)[:, None], high, low).to(tl.float32)
    power = tl.full([1], (194 - (1 << BIT)) << 23, tl.int32).to(tl.float32, bitcast=True)
    return tl.sum(pieces, 1), (pieces * power[None, :]).to(tl.bfloat16)


@prepared
@triton.jit(do_not_specialize=["scores_b", "scores_h", "blocks"])
def _score_sign(
    query, codes, count, scores,
    query_b, query_h, codes_b, codes_h, codes_n, scores_b, scores_h,
    blocks,
    DIM: tl.constexpr, BYTES: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr,
    SIZE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, HAS_COUNT: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    codes += row * codes_b + head * codes_h
    scores += row * scores_b + head * GROUP * scores_h
    query += row * query_b + head * GROUP * query_h
    known = blocks
    if HAS_COUNT:
        known = tl.minimum(blocks, tl.load(count))

    # The heads of the group twice, as high and low bfloat16 pieces, so that one product covers both.
    line = tl.arange(0, 2 * HALF)
    t0, q0 = _plane(query, query_h, line, 0, DIM, BYTES, GROUP, HALF)
    t1, q1 = _plane(query, query_h, line, 1, DIM, BYTES, GROUP, HALF)
    t2, q2 = _plane(query, query_h, line, 2, DIM, BYTES, GROUP, HALF)
    t3, q3 = _plane(query, query_h, line, 3, DIM, BYTES, GROUP, HALF)
    t4, q4 = _plane(query, query_h, line, 4, DIM, BYTES, GROUP, HALF)
    t5, q5 = _plane(query, query_h, line, 5, DIM, BYTES, GROUP, HALF)
    t6, q6 = _plane(query, query_h, line, 6, DIM, BYTES, GROUP, HALF)
    t7, q7 = _plane(query, query_h, line, 7, DIM, BYTES, GROUP, HALF)
    planes = (q0, q1, q2, q3, q4, q5, q6, q7)
    total = ((t0 + t1) + (t2 + t3)) + ((t4 + t5) + (t6 + t7))

    token, byte = tl.arange(0, TILE * SIZE), tl.arange(0, BYTES)
    place = token // SIZE * codes_n + token % SIZE
    member = tl.arange(0, HALF)
    for step in range(TILES):
        first = (tl.program_id(0) * TILES + step) * TILE
        base = codes + first.to(tl.int64) * codes_n
        real = first + token // SIZE < known
        mask = (byte < DIM // 8)[:, None] & real[None, :]
        bits = tl.load(base + byte[:, None] * SIZE + place[None, :], mask=mask, other=0).to(tl.int16) << 7
        scale = tl.load(base + DIM // 8 * SIZE + place, mask=real, other=0).to(tl.int32)
        scale = ((scale << 19) + (120 << 23)).to(tl.float32, bitcast=True)
        sums = tl.zeros([2 * HALF, TILE * SIZE], tl.float32)
        for bit in tl.static_range(8):
            sums += dot(planes[bit], (bits & (128 << bit)).to(tl.bfloat16, bitcast=True))
        # The sum over channels of +-q is twice the sum over those with bit 1, minus the sum over all.
        products = tl.sum(tl.reshape(sums * 2.0**61 - total[:, None], (2, HALF, TILE * SIZE)), 0)
        logits = tl.reshape(products * scale[None, :], (HALF, TILE, SIZE))
        highest = tl.max(logits, 2)
        mass = highest + tl.log2(tl.sum(tl.exp2(logits - highest[:, :, None]), 2))
        block = first + tl.arange(0, TILE)
        into = scores + member[:, None] * scores_h + block[None, :]
        found = tl.where((block < known)[None, :], mass, float("-inf"))
        tl.store(into, found, mask=(member < GROUP)[:, None] & (block < blocks)[None, :])


def score_sign(
    query: torch.Tensor, codes: torch.Tensor, scores: torch.Tensor, count: torch.Tensor | None = None,
    block_size: int = 32,
) -> None:  # fmt: skip
    """The LSE of each block's logits, base 2, for every query head.

    Parameters
    ----------
    query : Tensor (batch, query_heads, 1, head_dim) of bfloat16, float16 or float32
        In the space of the codes; products are logits in base 2. Magnitude below 2**60.
    codes : Tensor (batch, kv_heads, blocks, block_size * (head_dim / 8 + 1)) of uint8
        Codes of :class:`scout_hf.selection.SignCode`. The last stride must be 1.
    scores : Tensor (batch, query_heads, blocks) of float32
        Output; its last stride must be 1.
    count
        As in :func:`scout_hf.kernels.triton.score_minmax.score_minmax`.
    block_size : int
        A power of two.
    """
    batch, heads, blocks, _ = codes.shape
    dim, group = query.shape[3], query.shape[1] // heads
    half = max(MIN_ROWS // 2, next_power_of_2(group))
    tile = max(1, WARP_TOKENS // block_size)
    warps = min(4, max(1, block_size // WARP_TOKENS, half // MIN_ROWS))
    each = -(-blocks // tile)
    tiles = max(1, min(MOST_TILES, next_power_of_2(each), each * heads * batch // ENOUGH_PROGRAMS))
    tiles = 1 << tiles.bit_length() - 1
    _score_sign.launch(
        (-(-each // tiles), heads, batch),
        query, codes, count, scores,
        *query.stride()[:2], *codes.stride()[:3], *scores.stride()[:2],
        blocks,
        DIM=dim, BYTES=max(16, next_power_of_2(dim // 8)), GROUP=group, HALF=half,
        SIZE=block_size, TILE=tile, TILES=tiles, HAS_COUNT=count is not None,
        num_warps=warps,
    )  # fmt: skip
