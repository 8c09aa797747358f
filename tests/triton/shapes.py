"""What decoding and the benchmarks launch at the shapes of large models: batch 8, contexts of 64k, a budget of 2048."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

SHAPES = {"Llama-3-8B": (32, 8), "Qwen3-14B": (40, 8), "Llama-2-7B": (32, 32)}
"""Query heads and KV heads, of 128 channels."""
FEED_FORWARD = {"Llama-3-8B": 14336, "Qwen3-14B": 17408, "Llama-2-7B": 11008}
BATCH, BLOCK, DIM, BLOCKS, RESIDENT = 8, 32, 128, 2048, 64


def launches(shape: str) -> Iterator[tuple[str, Callable]]:
    """Names, and calls that launch."""
    from scout_hf.kernels import triton as kernels
    from scout_hf.kernels.triton import support
    from scout_hf.kernels.triton.tuning import PLAIN, default_tile

    support.INTERPRETED = True  # tensors on the CPU are refused else
    heads, kv_heads = SHAPES[shape]
    dtype = torch.bfloat16
    query = torch.zeros(BATCH, heads, 1, DIM, dtype=dtype)
    tail = torch.empty(2, BATCH, kv_heads, 4 * BLOCK, DIM, dtype=dtype)
    blocks = tail.unflatten(3, (-1, BLOCK))
    keys, values = torch.empty(2, BATCH, kv_heads, RESIDENT, BLOCK, DIM, dtype=dtype)
    ids = torch.zeros(BATCH, kv_heads, RESIDENT, dtype=torch.int32)
    slots = torch.zeros(BATCH, kv_heads, BLOCKS, dtype=torch.int32)
    one, words = torch.zeros(1, dtype=torch.int32), torch.zeros(3, 16, dtype=torch.int64)
    padding_mask, share = torch.ones(BATCH, BLOCKS * BLOCK, dtype=torch.bool), torch.zeros(1)
    tile, scale = default_tile(227 << 10, DIM, dtype), DIM**-0.5
    lists, scores = torch.empty(BATCH, kv_heads, RESIDENT, dtype=torch.int32), torch.zeros(BATCH, kv_heads, BLOCKS)
    chosen, counts = torch.zeros(BATCH, kv_heads, BLOCKS, dtype=torch.uint8), torch.zeros(2, BATCH, kv_heads)
    choice = kernels.Choice(chosen, lists, *counts.int())
    parts = torch.zeros(BATCH, heads, 6, DIM), torch.zeros(BATCH, heads, 6)
    where = {"first": one, "lengths": one, "num_kv_splits": 1}

    def attend(keys, values, tile=tile, **given):
        return lambda: kernels.attend_blocks(query, keys, values, scale, tile=tile, **{"num_kv_splits": 4} | given)

    yield "attend residents", attend(keys, values, ids=ids)
    yield "attend residents, padded", attend(keys, values, ids=ids, padding_mask=padding_mask)
    yield "attend tail", attend(*blocks, **where)
    yield "attend tail, padded", attend(*blocks, padding_mask=padding_mask, **where)
    yield "attend pages", attend(keys[:, :, 0], values[:, :, 0], pages=ids)
    for other in PLAIN:
        if other != tile and shape == next(iter(SHAPES)):
            yield "attend residents, another tile", attend(keys, values, other, ids=ids)
    of_cpu = query.float(), parts[1][:, :, :1].contiguous()
    yield "merge", lambda: kernels.merge(*parts, dtype=dtype)
    yield "merge the CPU's share", lambda: kernels.merge(*parts, *of_cpu, dtype=dtype)
    yield "merge in float32", lambda: kernels.merge(*parts, *of_cpu)
    yield "append", lambda: kernels.append_token(query[:, :kv_heads], query[:, :kv_heads], *tail, one, one, BLOCK)
    yield "choose", lambda: kernels.choose(scores, RESIDENT, 1, None, slots, RESIDENT, one, choice)
    yield (
        "choose, padded",
        lambda: kernels.choose(scores, RESIDENT, 1, padding_mask[:, :BLOCKS], slots, RESIDENT, one, choice),
    )
    masses = torch.zeros(BATCH, heads, BLOCKS)
    yield "mean share", lambda: kernels.mean_share(masses, kv_heads, None)
    yield "mean share, padded", lambda: kernels.mean_share(masses, kv_heads, padding_mask[:, :BLOCKS], masses[:, :, 0])
    yield "plan", lambda: kernels.plan_recall(ids, slots, choice, share, words[0, :1])
    moves = kernels.run_of_blocks(BATCH, kv_heads, 0, RESIDENT, ids.device)
    yield "copy", lambda: kernels.copy_blocks(torch.zeros(BATCH, BLOCKS, dtype=torch.int64), moves, keys, values)
    yield "adopt", lambda: kernels.adopt_block(3, blocks[0][:, :, 0], blocks[1][:, :, 0], ids, slots, keys, values)
    pages = torch.zeros(BATCH, BLOCKS, dtype=torch.int64)
    yield "move", lambda: kernels.move_block(*tail, one, pages, ids, slots, keys, values)
    yield "post", lambda: kernels.post(query, query.clone(), words[0, :1], words[1, :1])
    yield "wait", lambda: kernels.wait(words[0, :1], words[1, :1], words[2, :1])
    yield from _outside_attention(query, kv_heads, FEED_FORWARD[shape])
    yield from _digests(query, keys[:, :, :2], one)


def _outside_attention(query, kv_heads, wide) -> Iterator[tuple[str, Callable]]:
    from scout_hf.kernels import triton as kernels

    hidden, weight = query.reshape(BATCH, 1, -1), query.new_ones(query[0].numel())
    cos, sin = query.new_zeros(2, BATCH, 1, DIM)
    gate, up = query.new_zeros(2, BATCH, 1, wide)
    yield "norm", lambda: kernels.rms_norm(hidden, weight, 1e-5)
    yield "norm, shifted", lambda: kernels.rms_norm(hidden, weight, 1e-5, shifted=True)
    yield "norm of heads", lambda: kernels.rms_norm(query[:, :, 0], weight[:DIM], 1e-5)
    yield "rotate", lambda: kernels.rotate(query, query[:, :kv_heads], cos, sin)
    yield "rotate a query", lambda: kernels.rotate(query, query[:, :0], cos[:1], sin[:1])
    yield "gate", lambda: kernels.silu_product(gate, up)


def _digests(query, keys, one) -> Iterator[tuple[str, Callable]]:
    from scout_hf.kernels import triton as kernels
    from scout_hf.selection import make_digest

    for name in ("minmax", "minmax-int8", "minmax-sub", "sign", "sign2"):
        digest = make_digest(name)
        content = torch.randn(keys.shape[:2] + (2, BLOCK, DIM)).to(keys.dtype)
        digest.fit(content, None, None, 0.1)
        asked, codes = digest.prepare(query), digest.encode(content, None)
        yield f"encode {name}", functools.partial(kernels.encode, digest, content, None)
        yield (
            f"score {name}",
            lambda digest=digest, asked=asked, codes=codes: kernels.score(
                digest.native, asked, codes, BLOCK, count=one
            ),
        )
