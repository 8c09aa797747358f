"""Passes of several new tokens: attention over the past where it lies, against copying it out, and against float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from scout_hf.kernels.attend import attend
from scout_hf.kernels.cpu import make_backend
from scout_hf.kernels.cpu.native_backend import MANY, MOST_QUERIES, PIECE_TOKENS, NativeBackend
from scout_hf.methods import several_tokens
from scout_hf.methods.base import Method
from scout_hf.methods.offloading import OffloadingMethod
from scout_hf.stores import PagedKV, make_store, pages
from tests.libraries import ISAS, using_isa
from tests.unit.naive import attention, poison
from tests.unit.worlds import SETTINGS, World

BATCH, HEADS = 2, 2
# Around borders of blocks, of stages of 16 and 32 tokens, and of chunks of 1024.
LENGTHS = (1, 15, 16, 17, 31, 33, 64, 100, 1023, 1024, 1030)

pytestmark = pytest.mark.skipif(not ISAS, reason="no native library")


@pytest.fixture(autouse=True)
def poisoned_small_slabs(monkeypatch):
    monkeypatch.setattr(pages, "MIN_SLAB_PAGES", 5)
    poison(monkeypatch)


def make_mask(padding, tokens):
    """None, the first third, holes, or those and a row of nothing but padding."""
    if padding is None:
        return None
    mask = torch.ones(BATCH, tokens, dtype=torch.bool)
    if padding == "left":
        mask[0, : tokens // 3 + 1] = False
    else:
        mask[:, ::3] = False
        mask[0, 5:40] = False
    if padding == "all":
        mask[1] = False
    return mask


def filled(dtype, length, block, dim=32, host_dtype=None):
    """A store that has given up and reused pages, and what is in it."""
    generator = torch.Generator().manual_seed(length)
    store = make_store(BATCH, HEADS, dim, block, dtype, "cpu", host_dtype)
    rubbish = torch.full((BATCH, HEADS, 3 * block + 1, dim), torch.nan, dtype=dtype)
    store.append(rubbish, rubbish)
    store.crop(0)
    keys, values = torch.randn(2, BATCH, HEADS, length, dim, generator=generator).to(dtype)
    store.append(keys, values)
    return store, *store.read(0, length)


def largest_error(got, want):
    out, lse = want
    seen = lse > -torch.inf
    assert bool(((got.lse > -torch.inf) == seen).all())
    assert bool((got.out[~seen] == 0).all())
    if not bool(seen.any()):
        return 0.0
    return max(float((got.out - out)[seen].abs().max()), float((got.lse - lse)[seen].abs().max()))


@pytest.mark.thin(5)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("padding", [None, "left", "holes", "all"])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("queries", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("block", [4, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_is_as_exact_as_torch(dtype, block, queries, group, padding, isa):
    """Twice torch's error in the same dtype at most, or what rounding to float32 makes; no copy, one call."""
    backend, dim = make_backend("native"), 32
    for length in LENGTHS:
        store, keys, values = filled(dtype, length, block, dim)
        mask = make_mask(padding, length + 3)
        query = torch.randn(BATCH, queries, HEADS * group, dim).to(dtype).transpose(1, 2)
        past = max(1, length - queries % 7)
        allowed = None if mask is None else mask[:, None, None, :past]
        keys, values = keys[:, :, :past], values[:, :, :past]
        softcap = 5.0 if length == 33 else None
        want = attention(query, keys, values, 0.2, softcap, allowed)
        torchs = largest_error(attend(query, keys, values, 0.2, softcap, allowed), want)
        with using_isa(isa):
            got = backend.attend_past(query, store, past, 0.2, softcap, mask)
        assert largest_error(got, want) <= max(2 * torchs, 4e-6), (length, past)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("padding", [None, "left", "holes", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_queries_than_fit_one_strip(dtype, padding, isa):
    """The queries of a group are cut into strips, also within a query head; tokens are taken from any block on."""
    length, begin, past = 200, 64, 187
    store, keys, values = filled(dtype, length, 16)
    mask = make_mask(padding, length)
    query = torch.randn(BATCH, 113, HEADS * 5, 32).to(dtype).transpose(1, 2)
    allowed = None if mask is None else mask[:, None, None, begin:past]
    keys, values = keys[:, :, begin:past], values[:, :, begin:past]
    want = attention(query, keys, values, 0.2, None, allowed)
    torchs = largest_error(attend(query, keys, values, 0.2, None, allowed), want)
    with using_isa(isa):
        got = make_backend("native").attend_past(query, store, past, 0.2, None, mask, begin)
    assert largest_error(got, want) <= max(2 * torchs, 4e-6)


@pytest.mark.thin(3)
@pytest.mark.parametrize("isa", [isa for isa in ISAS if torch.bfloat16 in MANY.get(isa, ())])
@pytest.mark.parametrize("padding", [None, "left", "all"])
@pytest.mark.parametrize("before", [0, 1, 16, 45])
@pytest.mark.parametrize("queries", [17, 40, 64, 100])
def test_many_new_tokens_attend_over_the_pages(queries, before, padding, isa, monkeypatch):
    """To all before them, and causally to each other, in pieces that begin anywhere in a block."""
    monkeypatch.setattr(several_tokens, "PIECE", 8)
    monkeypatch.setattr(several_tokens, "AT_ONCE", 40)
    store, keys, values = filled(torch.bfloat16, before + queries, 16)
    mask = make_mask(padding, before + queries)
    query = torch.randn(BATCH, queries, HEADS * 2, 32).to(torch.bfloat16).transpose(1, 2)
    backend = make_backend("native")
    step = SimpleNamespace(mask=mask, padding=lambda device: mask, allowed=None, backend=backend)
    method = SimpleNamespace(kv=store, length=store.length, scoring=(0.2, None), past_pages=lambda step: store)
    order = torch.arange(before + queries)
    allowed = (order[before:, None] >= order)[None, None]
    allowed = allowed if mask is None else allowed & mask[:, None, None]
    want = attention(query, keys, values, 0.2, None, allowed)
    torchs = largest_error(attend(query, keys, values, 0.2, None, allowed), want)
    with using_isa(isa):
        pages_of = several_tokens.pages_of_all(method, step, query)
        new = slice(before, before + queries)
        got = several_tokens.attend_over_pages(method, step, query, keys[:, :, new], values[:, :, new], pages_of)
    assert largest_error(got, want) <= 2 * torchs


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("queries", [1, 3, 16])
def test_packed_pages_are_unpacked_on_the_way(queries, isa):
    """Also where the past ends within a packed block, or within the one that is being filled."""
    for length in (32, 40, 63, 64, 65, 150):
        store, keys, values = filled(torch.bfloat16, length, 32, host_dtype="int8")
        query = torch.randn(BATCH, HEADS * 4, queries, 32).to(torch.bfloat16)
        for past in (1, 31, length - 5, length):
            want = attention(query, keys[:, :, :past], values[:, :, :past], 0.2)
            with using_isa(isa):
                got = make_backend("native").attend_past(query, store, past, 0.2)
            assert largest_error(got, want) < 0.02, (length, past)


def test_threads_change_no_bit():
    store, _, _ = filled(torch.bfloat16, 5000, 32)
    query, before = torch.randn(BATCH, HEADS * 4, 7, 32).to(torch.bfloat16), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(make_backend("native").attend_past(query, store, 4999, 0.2))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_what_it_does_not_gain_by_or_know_is_left_to_others():
    backend = make_backend("native")
    store, _, _ = filled(torch.float32, 40, 16)
    many = torch.randn(BATCH, HEADS, MOST_QUERIES + 1, 32)
    for isa in ISAS:
        with using_isa(isa):
            gains = torch.float32 in MANY.get(isa, ())
            assert backend.gains_by_many(many, store) is gains
            assert (backend.attend_past(many, store, 40, 0.2) is not None) is gains
    assert not backend.gains_by_many(many.bfloat16(), store)
    assert not backend.gains_by_many(many.bfloat16(), filled(torch.bfloat16, 40, 16, host_dtype="int8")[0])
    assert not make_backend("torch").gains_by_many(many, store)
    assert backend.attend_past(many[:, :, 1:], store, 40, 0.2) is not None
    assert backend.attend_past(many[:, :, :2].double(), store, 40, 0.2) is None
    assert backend.attend_past(many[:, :, :2], store, 0, 0.2) is None
    assert make_backend("torch").attend_past(many[:, :, :2], store, 40, 0.2) is None


def test_pages_of_files_come_piece_by_piece(monkeypatch):
    """No more of them is asked for at a time than a piece, and every one before it is read."""
    store, keys, values = filled(torch.float32, 2 * PIECE_TOKENS + 100, 32)
    asked = []
    monkeypatch.setattr(type(store.table.pool), "watched", True)
    monkeypatch.setattr(PagedKV, "touch", lambda store, blocks, counts=None: asked.append(blocks))
    query = torch.randn(BATCH, HEADS * 2, 3, 32)
    past = 2 * PIECE_TOKENS + 50
    got = make_backend("native").attend_past(query, store, past, 0.2)
    assert largest_error(got, attention(query, keys[:, :, :past], values[:, :, :past], 0.2)) < 4e-6
    assert [part.shape[2] for part in asked] == [PIECE_TOKENS // 32] * 2 + [2]
    assert torch.cat([part[0, 0] for part in asked]).tolist() == list(range(-(-past // 32)))


@pytest.mark.parametrize("padding", [None, [0, 21, 5]], ids=["no padding", "padding"])
@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_goes_this_way(name, padding, monkeypatch):
    """Drafts, turns and chunks over one and two tiers equal stock, and nothing is copied out."""
    served, serve = [], NativeBackend.attend_past

    def watched(*args):
        served.append(serve(*args))
        return served[-1]

    def refused(*args):
        raise AssertionError("the past was copied")

    monkeypatch.setattr(NativeBackend, "attend_past", watched)
    world = World(name, 3, padding)
    world.check(50, 1, True)
    for kind in (Method, OffloadingMethod):
        monkeypatch.setattr(kind, "past_chunks", refused)
    for turn, tokens in enumerate((2, 1, 7, 1, 20)):
        world.check(tokens, turn, True)
    assert len(served) >= 6 and all(part is not None for part in served)
