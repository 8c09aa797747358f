"""Digests, scores and lists of blocks made by the native library, against what torch makes of the same."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scout_hf import ScoutConfig
from scout_hf.kernels.cpu import make_backend
from scout_hf.selection import MinMax, Selector
from scout_hf.stores import PackedKV, PagedKV, pages
from tests.libraries import ISAS, using_isa
from tests.unit.naive import QUICK, poison
from tests.unit.selecting import (
    BATCH,
    DIM,
    HEADS,
    KEYS,
    PADDING,
    SIZE,
    make_mask,
    make_step,
    make_store,
    naive_score,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


pytestmark = pytest.mark.skipif(not ISAS, reason="no native library")


@pytest.fixture(autouse=True)
def poisoned_small_slabs(monkeypatch):
    monkeypatch.setattr(pages, "MIN_SLAB_PAGES", 5)
    poison(monkeypatch)


def encoded(store, blocks, mask):
    """What the digest makes of the keys that the store gives back."""
    keys = store.read(0, blocks * SIZE)[0].unflatten(2, (-1, SIZE))
    return MinMax().encode(keys, None if mask is None else mask[:, : blocks * SIZE].unflatten(1, (-1, SIZE)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [PagedKV, PackedKV])
@QUICK
@given(seed=st.integers(0, 10**6), padding=st.sampled_from(PADDING), native=st.booleans())
def test_digests_from_pages_are_those_of_the_keys(dtype, kind, seed, padding, native):
    """Bit for bit, all at once or a few at a time, also after a crop, a fork or a change of rows."""
    dice = random.Random(seed)
    store = make_store(dice.randint(SIZE, 120), seed, dtype, kind, native)
    blocks, mask = store.length // SIZE, make_mask(padding, store.length + dice.randint(0, 9), seed)
    selector = Selector(ScoutConfig(digest="minmax", block_size=SIZE), 0, KEYS)
    selector.extend_from(store, dice.randint(0, blocks), mask)
    selector.extend_from(store, dice.randint(0, blocks), mask)
    selector.extend_from(store, blocks, mask)
    expected = encoded(store, blocks, mask)
    assert selector.blocks == blocks and selector.table.codes().dtype == dtype
    assert torch.equal(selector.table.codes(), expected)
    twin, rows = selector.fork(), torch.tensor([2, 0, 2])
    selector.crop(blocks // 2)
    selector.extend_from(store, blocks, mask)
    assert torch.equal(selector.table.codes(), expected)
    store.select_rows(rows)
    twin.select_rows(rows)
    twin.crop(blocks // 2)
    twin.extend_from(store, blocks, None if mask is None else mask[rows])
    assert torch.equal(twin.table.codes(), expected[rows])


def test_pages_are_digested_where_they_lie(monkeypatch):
    """No copy of the keys is made, unless the store has no native view."""
    selector, calls = Selector(ScoutConfig(digest="minmax", block_size=SIZE), 0, KEYS), []
    gather = PagedKV.gather
    monkeypatch.setattr(PagedKV, "gather", lambda *args: calls.append(None) or gather(*args))
    selector.extend_from(make_store(45, 0), 5, None)
    assert not calls
    selector.crop(0)
    selector.extend_from(make_store(45, 0, native=False), 5, None)
    assert calls


def test_garbage_in_keys_shows_in_the_digest():
    """A block that holds NaN must not look harmless; garbage in padding must."""
    keys = torch.randn(BATCH, HEADS, 3 * SIZE, DIM, generator=torch.Generator().manual_seed(0))
    for place in (0, 3, SIZE - 1):
        spoiled = keys.clone()
        spoiled[1, 0, SIZE + place, 5] = torch.nan
        store = PagedKV(BATCH, HEADS, DIM, SIZE, torch.float32, "cpu")
        store.append(spoiled, spoiled)
        mask = torch.ones(BATCH, 3 * SIZE, dtype=torch.bool)
        for hidden in (False, True):
            mask[1, SIZE + place] = not hidden
            for given_mask in (mask, None)[: 1 + (not hidden)]:
                selector = Selector(ScoutConfig(digest="minmax", block_size=SIZE), 0, KEYS)
                selector.extend_from(store, 3, given_mask)
                codes = selector.table.codes()
                wrong = codes.isnan().nonzero().tolist()
                assert wrong == ([] if hidden else [[1, 0, 1, 5], [1, 0, 1, 5 + DIM]])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 3, 8])
def test_scores_are_the_formula(isa, dtype, group):
    generator = torch.Generator().manual_seed(group)
    query = torch.randn(BATCH, HEADS * group, 1, DIM, generator=generator).to(dtype)
    keys = torch.randn(BATCH, HEADS, 70, SIZE, DIM, generator=generator).to(dtype)
    codes = torch.cat([MinMax().encode(keys, None)] * 2, dim=2)[:, :, :70]  # a part of a larger table
    expected = naive_score(query, keys)
    with using_isa(isa):
        for one in (query, query.transpose(2, 3).contiguous().transpose(2, 3)):
            scores = make_backend("native").score("minmax", one, codes)
            assert scores.shape == expected.shape and scores.dtype == torch.float32
            assert (scores - expected).abs().max() <= 3e-6 * expected.abs().max()


def test_what_has_no_native_score():
    backend, query = make_backend("native"), torch.randn(1, 2, 1, 16)
    codes = torch.randn(1, 2, 4, 32)
    for scorer, one, code in (
        ("mean", query, codes),
        ("minmax", query.double(), codes),
        ("minmax", query, codes.double()),
        ("minmax", query[..., :12], codes[..., :24].contiguous()),
    ):
        assert backend.score(scorer, one, code) is None
        assert backend.select(scorer, one, code, 2, 0, 0, SIZE, None) is None
    assert make_backend("torch").score("minmax", query, codes) is None
    assert make_backend("torch").select("minmax", query, codes, 2, 0, 0, SIZE, None) is None


def as_sets(lists, store):
    """The blocks of every list; distinct, and the one that is partly filled last."""
    found = []
    for row in range(BATCH):
        for head in range(HEADS):
            used = lists.ids.shape[2] if lists.counts is None else int(lists.counts[row, head])
            ids = lists.ids[row, head, :used].tolist()
            assert len(set(ids)) == len(ids) and all(0 <= block < store.blocks for block in ids)
            if store.length % SIZE and store.blocks - 1 in ids:
                assert ids[-1] == store.blocks - 1
            found.append(set(ids))
    return found


def assert_same_choice(native, expected, store, selector, query, blocks):
    """The same blocks, unless their scores are so near that rounding decides."""
    scores = selector.digest.score(query, selector.table.codes(blocks)).flatten(0, 1)
    for got, wanted, row in zip(as_sets(native, store), as_sets(expected, store), scores):
        assert len(got) == len(wanted)
        if got != wanted:
            differing = row[sorted(got ^ wanted)]
            assert differing.max() - differing.min() <= 1e-5 * row.abs().max()


def both_lists(store, mask, query, blocks, isa=None, **options):
    """The lists of a native and of a torch step, and the selector that made both."""
    selector = Selector(ScoutConfig(**{"digest": "minmax", "block_size": SIZE, **options}), 0, KEYS)
    selector.extend_from(store, store.length // SIZE, mask)
    with using_isa(isa or ISAS[-1]):
        native = selector.lists(make_step(store.length, mask, make_backend("native")), query, store, blocks)
    return native, selector.lists(make_step(store.length, mask, make_backend("torch")), query, store, blocks), selector


@pytest.mark.parametrize("isa", ISAS)
@QUICK
@given(
    seed=st.integers(0, 10**6),
    group=st.sampled_from([1, 3, 4, 8]),
    padding=st.sampled_from(PADDING),
    budget=st.sampled_from([None, 8, 24, 56, 0.05, 0.3, 0.77, 1.0]),
    sinks=st.sampled_from([0, 4, 9, 40]),
    window=st.sampled_from([0, 8, 30]),
    kind=st.sampled_from([PagedKV, PackedKV]),
)
def test_lists_are_those_of_torch(isa, seed, group, padding, budget, sinks, window, kind):
    dice = random.Random(seed)
    store = make_store(dice.randint(1, 200), seed, kind=kind)
    mask = make_mask(padding, store.length, seed)
    query = torch.randn(BATCH, HEADS * group, 1, DIM, generator=torch.Generator().manual_seed(seed))
    blocks = max(0, store.length // SIZE - dice.choice([-(-window // SIZE), 0, 1]))
    options = {"budget": budget, "sinks": sinks, "window": window}
    native, expected, selector = both_lists(store, mask, query, blocks, isa, **options)
    assert (native is None) == (expected is None)
    if native is not None:
        assert_same_choice(native, expected, store, selector, query, blocks)
        assert native.ids.dtype == torch.int32 and native.counts.dtype == torch.int32
        for row, count in zip(native.ids.flatten(0, 1).tolist(), native.counts.flatten().tolist()):
            assert row[:count] == sorted(row[:count])


def test_long_lists_and_equal_scores():
    """More blocks than one piece of work has, many of them alike: as many as asked for, the best among them."""
    tokens = 2100 * SIZE
    keys = torch.randn(BATCH, HEADS, 70, DIM, generator=torch.Generator().manual_seed(0))
    keys = keys[:, :, torch.arange(tokens) // SIZE % 70]
    store = PagedKV(BATCH, HEADS, DIM, SIZE, torch.float32, "cpu")
    store.append(keys, keys)
    query = torch.randn(BATCH, HEADS * 4, 1, DIM, generator=torch.Generator().manual_seed(1))
    codes = encoded(store, 2100, None)
    scores = MinMax().score(query, codes)
    for count in (1, 30, 31, 1000, 2099):
        native = make_backend("native").select("minmax", query, codes, count, 0, 0, SIZE, None)
        assert native.counts.tolist() == [[count] * HEADS] * BATCH
        chosen = scores.gather(2, native.ids.long())
        best = scores.topk(count, dim=2).values
        torch.testing.assert_close(chosen.sort(dim=2, descending=True).values, best, atol=1e-4, rtol=0)
        assert all(len(set(row)) == count for row in native.ids.flatten(0, 1).tolist())


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_all_scores_equal(value):
    codes = torch.full((1, 1, 50, 2 * DIM), value)
    query = torch.ones(1, 1, 1, DIM)
    for count, sinks in ((1, 0), (7, 2), (50, 0), (50, 50)):
        lists = make_backend("native").select("minmax", query, codes, count, sinks, 3, SIZE, None)
        ids = lists.ids[0, 0].tolist()
        assert lists.counts.tolist() == [[count + 3]] and ids[-3:] == [50, 51, 52]
        assert set(range(sinks)) <= set(ids) and len(set(ids)) == count + 3


def test_wrong_digests_change_the_lists():
    """The comparison with torch can fail."""
    store, query = make_store(200, 0), torch.randn(BATCH, HEADS, 1, DIM, generator=torch.Generator().manual_seed(0))
    native, expected, selector = both_lists(store, None, query, 25, budget=56)
    assert as_sets(native, store) == as_sets(expected, store)
    left_out = min(set(range(25)) - as_sets(expected, store)[3])
    selector.table.codes()[1, 1, left_out] = torch.tensor([100.0, -100.0]).repeat_interleave(DIM)
    wrong = selector.lists(make_step(200, None, make_backend("native")), query, store, 25)
    assert [a != b for a, b in zip(as_sets(wrong, store), as_sets(expected, store))] == [False] * 3 + [True] + [
        False
    ] * 2
    with pytest.raises(AssertionError):
        assert_same_choice(wrong, expected, store, selector, query, 25)


def test_a_digest_without_a_native_way_goes_through_torch():
    """``native = None``, as digests of one's own have."""
    store, query = make_store(200, 0), torch.randn(BATCH, HEADS, 1, DIM, generator=torch.Generator().manual_seed(0))
    selector = Selector(ScoutConfig(digest="minmax", block_size=SIZE, budget=56), 0, KEYS)
    selector._coded = selector._coded._replace(digest=type("Own", (MinMax,), {"native": None})())
    unused = SimpleNamespace(select=None, score=None)
    selector.extend_from(store, 25, None)
    lists = selector.lists(make_step(200, None, unused), query, store, 21)
    assert as_sets(lists, store) == as_sets(both_lists(store, None, query, 21, budget=56)[1], store)
