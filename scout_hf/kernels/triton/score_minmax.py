"""Score channel-wise bounds: one dot product per block with the summed queries of a GQA group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.support import next_power_of_2

# Elements of each bound per load: 8 KiB in bfloat16.
TILE_ELEMENTS = 4096


@prepared
@triton.jit(do_not_specialize=["scores_b", "scores_h", "blocks"])
def _score_minmax(
    query, codes, count, scores,
    query_b, query_h, codes_b, codes_h, codes_n, scores_b, scores_h,
    blocks,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    HAS_COUNT: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    known = blocks
    if HAS_COUNT:
        known = tl.minimum(blocks, tl.load(count))
    member, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    within = column < DIM
    asked = query + row * query_b + head * GROUP * query_h + member[:, None] * query_h + column[None, :]
    q = tl.load(asked, mask=(member < GROUP)[:, None] & within[None, :], other=0.0).to(tl.float32)
    upwards, downwards = tl.sum(tl.maximum(q, 0.0), 0), tl.sum(tl.minimum(q, 0.0), 0)

    first = tl.program_id(0) * TILE
    block = first + tl.arange(0, TILE)
    real = block < known
    mask = real[:, None] & within[None, :]
    codes += row * codes_b + head * codes_h + first.to(tl.int64) * codes_n
    bound = codes + tl.arange(0, TILE)[:, None] * codes_n + column[None, :]
    high = tl.load(bound, mask=mask, other=0.0).to(tl.float32)
    low = tl.load(bound + DIM, mask=mask, other=0.0).to(tl.float32)
    score = tl.sum(high * upwards[None, :] + low * downwards[None, :], 1)
    scores += row * scores_b + head * scores_h
    tl.store(scores + block, tl.where(real, score, float("-inf")), mask=block < blocks)


def score_minmax(
    query: torch.Tensor, codes: torch.Tensor, scores: torch.Tensor, count: torch.Tensor | None = None
) -> None:
    """``relu(q) . high + min(q, 0) . low`` of every block, summed over the GQA group.

    Parameters
    ----------
    query : Tensor (batch, query_heads, 1, head_dim) of bfloat16, float16 or float32
    codes : Tensor (batch, kv_heads, blocks, 2 * head_dim) of bfloat16, float16 or float32
        Upper, then lower bounds of the channels. The last stride must be 1.
    scores : Tensor (batch, kv_heads, at least blocks) of float32
        Output; the last stride must be 1.
    count : Tensor of one int32, or None
        Number of valid blocks; the others get -inf. None for all.
    """
    batch, heads, blocks, _ = codes.shape
    dim, group = query.shape[3], query.shape[1] // heads
    columns = next_power_of_2(dim)
    tile = max(1, TILE_ELEMENTS // columns)
    _score_minmax.launch(
        (-(-blocks // tile), heads, batch),
        query, codes, count, scores,
        *query.stride()[:2], *codes.stride()[:3], *scores.stride()[:2],
        blocks,
        DIM=dim, COLUMNS=columns, GROUP=group, ROWS=next_power_of_2(group), TILE=tile,
        HAS_COUNT=count is not None,
    )  # fmt: skip
