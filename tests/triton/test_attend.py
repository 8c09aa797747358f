"""The decode kernel and the merge of its parts, against float64 and against what torch loses in the same dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from scout_hf.fusion import Partial, fuse  # noqa: E402
from scout_hf.kernels.attend import attend  # noqa: E402
from scout_hf.kernels.triton.attend import attend_blocks, kv_splits_for  # noqa: E402
from scout_hf.kernels.triton.merge import merge  # noqa: E402
from scout_hf.kernels.triton.prefetch import row_ahead  # noqa: E402
from scout_hf.kernels.triton.tuning import Tile  # noqa: E402
from tests.triton.grid import DEVICE, chance, draw, generator, lists_of_blocks, whole  # noqa: E402
from tests.unit.naive import attention  # noqa: E402

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SLACK = {torch.float32: 2e-7, torch.float16: 1e-4, torch.bfloat16: 1e-3}


@triton.jit
def store_rows_ahead(first, pages, out, token, listed, n, t, BLOCK: tl.constexpr, HAS_PAGES: tl.constexpr):
    lane = tl.arange(0, 16)
    rows = row_ahead(first, pages, token + lane, listed, n, t, BLOCK, HAS_PAGES)
    tl.store(out + lane, rows.to(tl.int64))


def flat(blocks):
    return blocks.flatten(2, 3)


def allowed_tokens(ids, size, starts=None, lengths=None, padding_mask=None):
    """Which listed tokens count, (batch, heads, 1, listed * size), one by one."""
    place = ids[..., None] * size + torch.arange(size)
    real = (ids >= 0)[..., None].expand(place.shape)
    if starts is not None:
        real = real & (place >= starts[:, None, None, None])
    if lengths is not None:
        real = real & (place < lengths[:, None, None, None])
    if padding_mask is not None:
        rows = torch.arange(len(ids))[:, None, None, None]
        real = real & padding_mask[rows, place.clamp(0, padding_mask.shape[1] - 1)]
    return real.flatten(2)[:, :, None]


def stock(query, keys, values, scale, allowed):
    """torch's own attention in the dtype of the inputs; rows without keys are 0."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
    out = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=allowed.repeat_interleave(group, 1).expand(*query.shape[:3], -1), scale=scale
    )
    return out.nan_to_num(0.0)


def compare(got, lse, query, keys, values, scale, allowed, softcap=None):
    """The rule: at most twice what torch loses in the same dtype; the LSE to rounding."""
    expected, logs = attention(query, keys, values, scale, softcap, allowed)
    error = (got.double() - expected).abs().max()
    if softcap is None:
        of_torch = stock(query, keys, values, scale, allowed)
    else:
        of_torch = attend(query, keys, values, scale, softcap, allowed).out
    of_torch = (of_torch.double() - expected).abs().max()
    assert error <= 2 * of_torch + 2 * SLACK[query.dtype]
    seen = logs > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert bool(((lse - logs)[seen].abs() <= 1e-5 + 5e-7 * logs[seen].abs()).all())
    assert bool((got[~seen] == 0).all())


CASES = [
    # kv heads, group, head_dim, block, listed, parts, tile tokens
    (2, 1, 64, 16, 9, 1, 16),
    (1, 4, 128, 32, 5, 2, 64),
    (2, 7, 80, 16, 11, 3, 32),
    (1, 5, 96, 32, 3, 5, 128),
    (3, 2, 128, 64, 2, 2, 32),
    (1, 8, 256, 32, 4, 1, 64),
    (1, 16, 64, 128, 2, 2, 64),
    (1, 32, 64, 16, 1, 1, 64),
    (2, 2, 8, 16, 3, 2, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.thin(2)
def test_listed_blocks_are_attended_as_in_float64(case, dtype):
    heads, group, dim, size, listed, parts, tokens = case
    batch, seed = 2, hash(case) % 1000
    query = draw(seed, batch, heads * group, 1, dim, dtype=dtype)
    keys, values = (draw(seed + part, batch, heads, listed, size, dim, dtype=dtype) for part in (1, 2))
    ids = lists_of_blocks(seed, batch, heads, listed + 3, listed)
    lengths = torch.tensor([(listed + 3) * size - 5, (listed + 1) * size + 1], dtype=torch.int32)
    starts = torch.tensor([0, size + 3], dtype=torch.int32)
    padding_mask = ~chance(seed, 0.1, batch, (listed + 3) * size)
    given = {"starts": starts, "lengths": lengths, "padding_mask": padding_mask}
    for names in ((), ("starts", "lengths"), ("padding_mask", "lengths")):
        chosen = {name: given[name] for name in names}
        out, lse = attend_blocks(
            query, keys, values, dim**-0.5, ids=ids, num_kv_splits=parts, tile=Tile(tokens=tokens), **chosen
        )
        assert out.shape == (batch, heads * group, parts, dim) and lse.shape == out.shape[:3]
        got, log = merge(out, lse)
        compare(got, log, query, flat(keys), flat(values), dim**-0.5, allowed_tokens(ids, size, **chosen))


@pytest.mark.parametrize("softcap", [5.0, 50.0])
def test_soft_caps(softcap):
    query = draw(0, 2, 4, 1, 64) * 4
    keys, values = draw(1, 2, 2, 3, 32, 64), draw(2, 2, 2, 3, 32, 64)
    out, lse = merge(*attend_blocks(query, keys, values, 0.3, softcap, num_kv_splits=2))
    everything = torch.ones(2, 2, 1, 96, dtype=torch.bool)
    compare(out, lse, query, flat(keys), flat(values), 0.3, everything, softcap)


def test_a_run_of_blocks_counts_from_its_first():
    """The tail of a cache: no list, and a last block that is not full."""
    query, keys, values = draw(0, 2, 4, 1, 64), draw(1, 2, 2, 3, 16, 64), draw(2, 2, 2, 3, 16, 64)
    keys[:, :, 2, 5:], values[:, :, 2, 5:] = torch.nan, torch.nan  # nobody has written there
    lengths = torch.tensor([7 * 16 + 2 * 16 + 5], dtype=torch.int32)
    starts = torch.tensor([0, 7 * 16 + 9], dtype=torch.int32)
    out, lse = merge(
        *attend_blocks(query, keys, values, 0.125, first=7, lengths=lengths, starts=starts, num_kv_splits=2)
    )
    first = torch.tensor([7], dtype=torch.int32)
    same, _ = merge(
        *attend_blocks(query, keys, values, 0.125, first=first, lengths=lengths, starts=starts, num_kv_splits=2)
    )
    assert torch.equal(out, same)
    ids = torch.arange(7, 10).expand(2, 2, 3)
    allowed = allowed_tokens(ids, 16, starts, lengths.expand(2))
    compare(out, lse, query, flat(keys).nan_to_num(), flat(values).nan_to_num(), 0.125, allowed)


def test_blocks_in_a_pool_are_found_by_their_pages():
    batch, heads, listed, size, dim = 2, 2, 4, 16, 64
    pool = draw(0, 20, heads, 2, size, dim, dtype=torch.bfloat16)
    pages = torch.stack([torch.randperm(20, generator=generator(row), device="cpu")[:listed] for row in range(2)])
    pages = pages.to(DEVICE)[:, None].expand(batch, heads, listed)
    query = draw(1, batch, 4, 1, dim, dtype=torch.bfloat16)
    out, lse = merge(*attend_blocks(query, pool[:, :, 0], pool[:, :, 1], 0.1, pages=pages, num_kv_splits=2))
    gathered = pool[pages[:, 0]].permute(3, 0, 2, 1, 4, 5)
    everything = torch.ones(batch, heads, 1, listed * size, dtype=torch.bool)
    compare(out, lse, query, gathered[0].flatten(2, 3), gathered[1].flatten(2, 3), 0.1, everything)


def test_views_with_strides_need_no_copy():
    """Slots of a larger buffer, and queries as a projection leaves them."""
    buffer = draw(0, 2, 2, 2, 8, 16, 64)
    keys, values = buffer[0, :, :, 1:5], buffer[1, :, :, 1:5]
    query = draw(1, 2, 1, 4, 64).transpose(1, 2)
    out, lse = merge(*attend_blocks(query, keys, values, 0.125, num_kv_splits=1))
    compare(out, lse, query, flat(keys), flat(values), 0.125, torch.ones(2, 2, 1, 64, dtype=torch.bool))


def test_empty_lists_give_nothing():
    query, keys = draw(0, 1, 2, 1, 64), torch.full((1, 1, 2, 16, 64), torch.nan)
    ids = torch.full((1, 1, 2), -1, dtype=torch.int32)
    out, lse = attend_blocks(query, keys, keys, 1.0, ids=ids, num_kv_splits=3)
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())
    out, lse = merge(out, lse)
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


def test_what_is_not_a_number_reaches_the_result():
    query, keys, values = draw(0, 1, 2, 1, 64), draw(1, 1, 1, 4, 16, 64), draw(2, 1, 1, 4, 16, 64)
    keys[0, 0, 2, 3, 7] = torch.nan
    out, _ = merge(*attend_blocks(query, keys, values, 0.1, num_kv_splits=2))
    assert bool(out.isnan().any())


def test_scores_far_apart_do_not_overflow():
    query = torch.full((1, 1, 1, 64), 30.0)
    keys, values = draw(1, 1, 1, 4, 16, 64) * 30, draw(2, 1, 1, 4, 16, 64)
    out, lse = merge(*attend_blocks(query, keys, values, 1.0, num_kv_splits=4))
    assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
    compare(out, lse, query, flat(keys), flat(values), 1.0, torch.ones(1, 1, 1, 64, dtype=torch.bool))


def test_parts_go_where_they_are_told_to():
    query, keys, values = draw(0, 2, 4, 1, 64), draw(1, 2, 2, 4, 16, 64), draw(2, 2, 2, 4, 16, 64)
    out, lse = torch.full((2, 4, 5, 64), torch.nan), torch.full((2, 4, 5), -torch.inf)
    attend_blocks(query, keys[:, :, :2], values[:, :, :2], 0.1, into=(out[:, :, 1:3], lse[:, :, 1:3]))
    attend_blocks(query, keys[:, :, 2:], values[:, :, 2:], 0.1, into=(out[:, :, 3:4], lse[:, :, 3:4]))
    assert bool(out[:, :, [0, 4]].isnan().all())
    got, log = merge(out, lse)
    compare(got, log, query, flat(keys), flat(values), 0.1, torch.ones(2, 2, 1, 64, dtype=torch.bool))


@pytest.mark.parametrize("parts, more, sinks", list(itertools.product((1, 3, 8), (False, True), (False, True))))
def test_merging_equals_fusing(parts, more, sinks):
    batch, heads, dim, seed = 2, 3, 80, parts
    out, lse = draw(seed, batch, heads, parts, dim), draw(seed + 1, batch, heads, parts) * 8
    lse[0, 0], lse[1, 2, 0] = -torch.inf, -torch.inf
    out[lse == -torch.inf] = torch.nan  # where no token was, nobody has written
    given = [Partial(out[:, :, [part]].nan_to_num(), lse[:, :, [part]]) for part in range(parts)]
    extra = (draw(seed + 2, batch, heads, 1, dim), draw(seed + 3, batch, heads, 1)) if more else (None, None)
    if more:
        extra[1][1, 1] = -torch.inf
        given.append(Partial(*extra))
        extra = (extra[0].masked_fill(extra[1][..., None] == -torch.inf, torch.nan), extra[1])
    weights = draw(seed + 4, heads) if sinks else None
    if sinks:
        given.append(Partial(torch.zeros(batch, heads, 1, dim), weights.view(1, -1, 1).expand(batch, -1, -1)))
    got, log = merge(out, lse, *extra, weights)
    expected = fuse([Partial(part.out.double(), part.lse.double()) for part in given])
    assert (got - expected.out).abs().max() <= 1e-6
    seen = expected.lse > -torch.inf
    assert torch.equal(seen, log > -torch.inf) and (log[seen] - expected.lse[seen]).abs().max() <= 2e-6


def test_the_output_comes_in_the_dtype_asked_for():
    out, _ = merge(draw(0, 1, 2, 3, 64), draw(1, 1, 2, 3), dtype=torch.bfloat16)
    assert out.dtype == torch.bfloat16


def test_a_list_is_cut_into_as_many_parts_as_keep_the_chip_busy(monkeypatch):
    from scout_hf.kernels.triton import attend

    monkeypatch.setattr(attend, "multiprocessors", lambda device: 132)
    assert kv_splits_for(torch.device("cpu"), 8, 64, 32) == 8  # of 256 tokens each, no smaller
    assert kv_splits_for(torch.device("cpu"), 128, 64, 32) == 3
    assert (
        kv_splits_for(torch.device("cpu"), 64, 64, 32) == 4
    )  # 5 would give some three of a fifth, not two of a quarter
    assert kv_splits_for(torch.device("cpu"), 1024, 64, 32) == 1
    assert kv_splits_for(torch.device("cpu"), 1, 10**5, 32) == 32
    assert kv_splits_for(torch.device("cpu"), 1, 1, 16) == 1


def test_the_prefetched_rows_are_those_of_the_list():
    """The addresses that the compiled kernel asks for, which the interpreter cannot ask for."""
    pool, pages = draw(0, 6, 8, 4, dtype=torch.bfloat16), torch.tensor([4, -1, 2], dtype=torch.int32)
    for given in (None, pages):
        out = torch.zeros(16, dtype=torch.int64)
        args = (pool, pool if given is None else given, out, 11, 3, *pool.stride()[:2], 8, given is not None)
        store_rows_ahead[(1,)](*args)
        tokens = torch.arange(11, 27).clamp(max=23)
        entry = tokens // 8 if given is None else given.clamp(min=0)[tokens // 8].long()
        assert torch.equal(out, pool.data_ptr() + (entry * 32 + tokens % 8 * 4) * 2)


def test_tiles_are_measured_once_and_kept(monkeypatch, tmp_path):
    from scout_hf.kernels.triton import tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()
    tiles = (Tile(), Tile(32), Tile(128))

    def bench(run, **_):
        return run()

    def run(tile):
        if tile.tokens == 128:
            raise tuning.triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return {64: 3.0, 32: 2.0}[tile.tokens]

    monkeypatch.setattr(tuning.triton.testing, "do_bench", bench)
    query, keys = draw(0, 1, 4, 1, 64), draw(1, 1, 2, 3, 16, 64)
    assert tuning.tile_for(query, keys) == Tile()
    assert tuning.tune(query, keys, run, tiles) == {Tile(): 3.0, Tile(32): 2.0}
    assert tuning.tile_for(query, keys) == Tile(32)
    tuning.forget()
    assert tuning.tile_for(query, keys) == Tile(32) and tuning.tile_for(query, keys[..., :8, :]) == Tile()
    monkeypatch.undo()
    tuning.forget()


def test_lists_may_be_of_either_integer():
    query, keys, values = draw(0, 1, 2, 1, 64), draw(1, 1, 1, 4, 16, 64), draw(2, 1, 1, 4, 16, 64)
    ids = whole(3, 0, 9, 1, 1, 4)
    lengths = torch.tensor([100], dtype=torch.int32)
    one, two = (attend_blocks(query, keys, values, 0.1, ids=ids.to(kind), lengths=lengths, num_kv_splits=1)[0]
                for kind in (torch.int32, torch.int64))  # fmt: skip
    assert torch.equal(one, two)


@pytest.mark.parametrize("capacity", [227, 163, 99])
def test_tiles_that_nobody_measured_fit_into_shared_memory(capacity):
    from scout_hf.kernels.triton.tuning import default_tile

    expected = {(128, torch.bfloat16): 64, (80, torch.float16): 64, (64, torch.float32): 64}
    # Beyond 64 channels float32 would spill registers in larger tiles, as the compiled kernels show.
    expected |= {(80, torch.float32): 16, (128, torch.float32): 16, (256, torch.float32): 16}
    expected[256, torch.bfloat16] = 64 if capacity == 227 else 32
    for (dim, dtype), tokens in expected.items():
        tile = default_tile(capacity << 10, dim, dtype)
        assert tile.tokens == tokens, (dim, dtype)
        row = max(16, triton.next_power_of_2(dim)) * dtype.itemsize
        assert 2 * tile.tokens * tile.stages * row <= capacity << 10
