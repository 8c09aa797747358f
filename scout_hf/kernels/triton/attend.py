"""Decode attention over listed blocks, in splits with an LSE each (Flash-Decoding).

Query heads of one GQA group are the rows of one tensor-core tile, so a block is read once for all of them. Logits are
in base 2 inside the kernel; the returned LSE is natural.
"""

from __future__ import annotations

import functools
from fractions import Fraction

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.prefetch import LINE_BYTES, OFF, ask_for, row_ahead
from scout_hf.kernels.triton.support import (
    INTERPRETED,
    LN2,
    LOG2E,
    MIN_ROWS,
    dot,
    multiprocessors,
    next_power_of_2,
    tanh,
)
from scout_hf.kernels.triton.tuning import Tile, tile_for

MAX_KV_SPLITS = 32


@triton.jit
def _rows(first, column, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a tile, with zeros behind their ``DIM`` channels."""
    if DIM == COLUMNS:
        return tl.load(first + column[None, :])
    else:
        return tl.load(first + column[None, :], mask=(column < DIM)[None, :], other=0.0)


@triton.jit
def _tiles(
    q, keys, values, pages, ids, starts, lengths, padding_mask, column, begin, end,
    keys_n, keys_t, values_n, values_t, listed, first, scale, softcap,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    HAS_PAGES: tl.constexpr, HAS_IDS: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_PADDING_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PREFETCH: tl.constexpr, AHEAD: tl.constexpr, BYTES: tl.constexpr, LINES: tl.constexpr, STAGES: tl.constexpr,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """Sum, its weights and the largest logit over tiles ``begin`` to ``end - 1``.

    No load of keys and values waits for what says which of them count, so loads are pipelined. That values which do
    not count are finite is taken on trust, as 0 times infinity is NaN; ``CLEAN`` replaces them.
    """
    e_max = tl.full([ROWS], float("-inf"), tl.float32)
    e_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in tl.range(begin, end, num_stages=STAGES):
        token = tile * TILE + tl.arange(0, TILE)
        real = token < listed * BLOCK
        entry, offset = tl.minimum(token // BLOCK, listed - 1), token % BLOCK
        if HAS_IDS:
            block = tl.load(ids + entry)
            real = real & (block >= 0)
        else:
            block = first + entry
        place = block * BLOCK + offset
        if HAS_STARTS:
            real = real & (place >= tl.load(starts))
        if HAS_LENGTHS:
            real = real & (place < tl.load(lengths))
        if HAS_PADDING_MASK:
            real = real & (tl.load(padding_mask + place, mask=real, other=0) != 0)
        # An entry that does not count may hold an invalid page.
        page = tl.load(pages + entry, mask=real, other=0) if HAS_PAGES else entry
        page = page.to(tl.int64)
        if PREFETCH:
            later = token + AHEAD * TILE
            ask_for(row_ahead(keys, pages, later, listed, keys_n, keys_t, BLOCK, HAS_PAGES), BYTES, LINES, PREFETCH)
            ask_for(
                row_ahead(values, pages, later, listed, values_n, values_t, BLOCK, HAS_PAGES), BYTES, LINES, PREFETCH
            )
        k = _rows(keys + (page * keys_n + offset * keys_t)[:, None], column, DIM, COLUMNS)
        scores = dot(q, tl.trans(k)) * scale
        if HAS_SOFTCAP:
            scores = softcap * tanh(scores / softcap)
        scores = tl.where(real[None, :], scores * LOG2E, float("-inf"))
        new_max = tl.maximum(e_max, tl.max(scores, 1))
        # Before the first valid token: avoid -inf - (-inf).
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - base[:, None])
        keep = tl.exp2(e_max - base)
        e_sum = e_sum * keep + tl.sum(weights, 1)
        v = _rows(values + (page * values_n + offset * values_t)[:, None], column, DIM, COLUMNS)
        if CLEAN:
            v = tl.where(real[:, None], v, 0.0)
        acc = acc * keep[:, None] + dot(weights.to(v.dtype), v)
        e_max = new_max
    return acc, e_sum, e_max


@prepared
@triton.jit(do_not_specialize=["first", "listed", "mask_b"])
def _attend(
    query, keys, values, pages, ids, first_at, starts, lengths, padding_mask, out, lse,
    query_b, query_h,
    keys_b, keys_h, keys_n, keys_t,
    values_b, values_h, values_n, values_t,
    pages_b, pages_h, ids_b, ids_h, lengths_b, mask_b, out_h,
    listed, first, num_kv_splits, scale, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    HAS_PAGES: tl.constexpr, HAS_IDS: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_PADDING_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PREFETCH: tl.constexpr, AHEAD: tl.constexpr, BYTES: tl.constexpr, LINES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    group, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside, within = group < GROUP, column < DIM
    keys += row.to(tl.int64) * keys_b + head.to(tl.int64) * keys_h
    values += row.to(tl.int64) * values_b + head.to(tl.int64) * values_h
    pages += row * pages_b + head * pages_h
    ids += row * ids_b + head * ids_h
    starts += row
    lengths += row * lengths_b
    padding_mask += row.to(tl.int64) * mask_b
    asked = query + row * query_b + (head * GROUP + group)[:, None] * query_h + column[None, :]
    if HAS_FIRST:
        first = tl.load(first_at)
    q = tl.load(asked, mask=inside[:, None] & within[None, :], other=0.0)
    tiles = tl.cdiv(listed * BLOCK, TILE)
    # Splits differ by one tile at most.
    begin, end = tiles * split // num_kv_splits, tiles * (split + 1) // num_kv_splits
    acc, e_sum, e_max = _tiles(
        q, keys, values, pages, ids, starts, lengths, padding_mask, column, begin, end,
        keys_n, keys_t, values_n, values_t, listed, first, scale, softcap,
        DIM, BLOCK, ROWS, COLUMNS, TILE, HAS_PAGES, HAS_IDS, HAS_STARTS, HAS_LENGTHS, HAS_PADDING_MASK, HAS_SOFTCAP,
        PREFETCH, AHEAD, BYTES, LINES, STAGES, False,
    )  # fmt: skip
    if tl.max(tl.max((acc - acc != 0.0).to(tl.int32), 1), 0) > 0:
        # Seldom, and in small tiles, so that it takes no registers from the loop before.
        acc, e_sum, e_max = _tiles(
            q, keys, values, pages, ids, starts, lengths, padding_mask, column,
            begin * (TILE // 16), end * (TILE // 16),
            keys_n, keys_t, values_n, values_t, listed, first, scale, softcap,
            DIM, BLOCK, ROWS, COLUMNS, 16, HAS_PAGES, HAS_IDS, HAS_STARTS, HAS_LENGTHS, HAS_PADDING_MASK, HAS_SOFTCAP,
            0, AHEAD, BYTES, LINES, 2, True,
        )  # fmt: skip

    empty = e_sum == 0.0
    result = acc / tl.where(empty, 1.0, e_sum)[:, None]
    index = (row * KV_HEADS * GROUP + head * GROUP + group).to(tl.int64) * out_h + split
    tl.store(out + index[:, None] * DIM + column[None, :], result, mask=inside[:, None] & within[None, :])
    logs = tl.where(empty, float("-inf"), (e_max + tl.log2(tl.where(empty, 1.0, e_sum))) * LN2)
    tl.store(lse + index, logs, mask=inside)


def attend_blocks(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float | None = None,
    *,
    ids: torch.Tensor | None = None,
    first: int | torch.Tensor = 0,
    pages: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
    num_kv_splits: int | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial attention of one query per row over listed blocks, in ``num_kv_splits`` splits.

    Parameters
    ----------
    query : Tensor (batch, query_heads, 1, head_dim)
        bfloat16, float16 or float32, like the keys; query heads are a multiple of KV heads.
    keys, values : Tensor (batch, kv_heads, n, block_size, head_dim), or (pages, kv_heads, block_size, head_dim)
        The listed blocks, or with ``pages`` the pool that contains them. The last stride must be 1.
    scale, softcap
        As in :func:`scout_hf.kernels.attend.attend`.
    ids : Tensor (batch, kv_heads, n) of int32 or int64, or None
        Block numbers, which give the positions of the tokens; -1 for an empty entry. None for the blocks from
        ``first`` on, in order.
    first : int or Tensor (1,) of int32
    pages : Tensor (batch, kv_heads, n) of int32 or int64, or None
        Page of each listed block in the pool.
    starts, lengths : Tensor (batch,) of int32, or None
        First token of each row, and last token + 1; ``lengths`` may have one element for all rows.
    padding_mask : Tensor (batch, tokens) of bool, or None
        False for padding; must cover all listed blocks up to ``lengths``.
    into : tuple of two Tensors of float32, or None
        Output and LSE buffers in the returned shapes: contiguous, or views of some splits of contiguous ones.
    num_kv_splits : int or None
        Number of splits of each list; None for enough to fill the GPU.
    tile : Tile or None
        Compile-time sizes; None for the best known for these shapes.

    Returns
    -------
    out : Tensor (batch, query_heads, num_kv_splits, head_dim) of float32
        Exactly 0 for a split without tokens.
    lse : Tensor (batch, query_heads, num_kv_splits) of float32
        Natural; -inf for a split without tokens.

    Examples
    --------
    >>> query = torch.randn(1, 8, 1, 64, device="cuda")  # doctest: +SKIP
    >>> keys, values = torch.randn(2, 1, 2, 4, 32, 64, device="cuda")  # doctest: +SKIP
    >>> out, lse = attend_blocks(query, keys, values, 64**-0.5, num_kv_splits=2)  # doctest: +SKIP
    >>> out.shape, lse.shape  # doctest: +SKIP
    (torch.Size([1, 8, 2, 64]), torch.Size([1, 8, 2]))
    """
    batch, query_heads, _, dim = query.shape
    kv_heads, size = keys.shape[1], keys.shape[-2]
    listed = keys.shape[2] if pages is None else pages.shape[2]
    if into is not None:
        num_kv_splits = into[1].shape[2]
    elif num_kv_splits is None:
        num_kv_splits = kv_splits_for(query.device, batch * kv_heads, listed, size)
    if into is None:
        out = torch.empty((batch, query_heads, num_kv_splits, dim), dtype=torch.float32, device=query.device)
        into = out, torch.empty((batch, query_heads, num_kv_splits), dtype=torch.float32, device=query.device)
    out, lse = into
    group, row = query_heads // kv_heads, dim * keys.element_size()
    tile = tile or tile_for(query, keys)
    at = first if isinstance(first, torch.Tensor) else None
    # A missing tensor needs some pointer: the query serves, and the kernel does not read it.
    given = [query if part is None else part for part in (pages, ids, at, starts, lengths, padding_mask)]
    places = [keys.stride(), values.stride()]
    strides = [stride[:4] if pages is None else (0, stride[1], stride[0], stride[2]) for stride in places]
    _attend.launch(
        (batch * kv_heads, num_kv_splits),
        query, keys, values, *given, out, lse,
        query.stride(0), query.stride(1), *strides[0], *strides[1],
        *(given[0].stride()[:2]), *(given[1].stride()[:2]),
        0 if lengths is None or lengths.shape[0] == 1 else lengths.stride(0), given[5].stride(0), lse.stride(1),
        listed, first if at is None else 0, num_kv_splits, scale, 1.0 if softcap is None else softcap,
        kv_heads, group, dim, size,
        max(MIN_ROWS, next_power_of_2(group)), max(MIN_ROWS, next_power_of_2(dim)),
        max(MIN_ROWS, tile.tokens),
        pages is not None, ids is not None, at is not None, starts is not None,
        lengths is not None, padding_mask is not None, softcap is not None,
        OFF if INTERPRETED else tile.prefetch, tile.ahead, row, next_power_of_2(-(-row // LINE_BYTES)),
        tile.stages,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse


def kv_splits_for(device: torch.device, lists: int, listed: int, block_size: int) -> int:
    """``num_kv_splits`` that fills all multiprocessors evenly, with at least a few hundred tokens per split.

    Examples
    --------
    >>> kv_splits_for(torch.device("cuda"), lists=8, listed=64, block_size=32)  # 132 multiprocessors  # doctest: +SKIP
    8
    """
    return _even_splits(multiprocessors(device), lists, listed * block_size)


@functools.lru_cache
def _even_splits(cores: int, lists: int, tokens: int) -> int:
    most = max(1, min(-(-2 * cores // lists), tokens // 256, MAX_KV_SPLITS))
    # All is done when the multiprocessor with most splits is; of the same time, the most splits hide latency best.
    return min(range(1, most + 1), key=lambda splits: (Fraction(-(-lists * splits // cores), splits), -splits))
