"""Attention over host blocks against float64: with torch, and natively with every instruction set of this machine."""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scout_hf import ConfigError
from scout_hf.errors import CacheStateError
from scout_hf.fusion import Partial
from scout_hf.kernels.cpu import (
    Attended,
    BlockLists,
    CpuBackend,
    backend_names,
    make_backend,
    native_backend,
    torch_backend,
)
from scout_hf.kernels.cpu import library as native
from scout_hf.stores import PackedKV, PagedKV, pages
from tests.libraries import ISAS, WAYS, using_isa, without_library
from tests.unit.attending import BATCH, DIM, KV_HEADS, assert_same, held_back, make_query
from tests.unit.naive import QUICK, attention, poison

SIZE = 8
ERROR = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}
INT8_ERROR = 1.5e-2
"""Natively the weights of int8 values are rounded too, to 1/255 of a tile's largest: half that of values up to 4."""
GARBAGE = 2**30
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def poisoned_small_slabs(monkeypatch):
    monkeypatch.setattr(pages, "MIN_SLAB_PAGES", 5)
    poison(monkeypatch)


def no_fallback(*args):
    raise AssertionError("the native backend asked torch")


@pytest.fixture(params=WAYS)
def backend(request):
    """A backend that does its work itself; natively with one instruction set, which is then the process's."""
    if request.param == "torch":
        one = make_backend("torch")
        yield one
    else:
        with using_isa(request.param):
            one = make_backend("native")
            one._torch = SimpleNamespace(attend_blocks=no_fallback, start=no_fallback, close=lambda: None)
            yield one
    one.close()


@pytest.fixture(params=["torch", "native"][: 1 + bool(ISAS)])
def any_backend(request):
    """One of each kind, the native one with its fallback."""
    one = make_backend(request.param)
    yield one
    one.close()


def make_store(tokens, seed=0, dtype=torch.float32, dim=DIM, batch=BATCH, size=SIZE, heads=KV_HEADS, kind=PagedKV):
    generator = torch.Generator().manual_seed(seed)
    store = kind(batch, heads, dim, size, dtype, "cpu")
    keys, values = torch.randn(2, batch, heads, tokens, dim, generator=generator).to(dtype)
    step = max(13, tokens // 6)
    for first in range(0, tokens, step):
        store.append(keys[:, :, first : first + step], values[:, :, first : first + step])
    return store


def random_lists(dice, store, ragged, most=None):
    """Distinct blocks in any order, what is partly filled last; what a list does not use is garbage."""
    whole = store.length // store.block_size
    shape, most = (store.batch, store.heads), whole if most is None else most
    counts = [dice.randint(0, most) for _ in range(shape[0] * shape[1])] if ragged else [dice.randint(0, most)] * 4
    last = [store.blocks > whole and (dice.random() < 0.5 if ragged else True) for _ in counts]
    found = [dice.sample(range(whole), count) + [whole] * tail for count, tail in zip(counts, last)]
    longest = max(map(len, found))
    ids = torch.tensor([one + [GARBAGE] * (longest - len(one)) for one in found], dtype=torch.int32)
    ids = ids.view(*shape, longest)
    return BlockLists(ids, torch.tensor([len(one) for one in found], dtype=torch.int32).view(shape) if ragged else None)


def seen_tokens(store, lists, padding_mask=None):
    """(batch, kv_heads, 1, tokens): what lists and padding leave to be attended."""
    seen = torch.zeros(store.batch, store.heads, 1, store.length, dtype=torch.bool)
    for row in range(store.batch):
        for head in range(store.heads):
            blocks = range(store.blocks)
            if lists is not None:
                used = lists.ids.shape[2] if lists.counts is None else int(lists.counts[row, head])
                blocks = lists.ids[row, head, :used].tolist()
            for block in blocks:
                seen[row, head, 0, block * store.block_size : (block + 1) * store.block_size] = True
    return seen if padding_mask is None else seen & padding_mask[:, None, None, : store.length]


def compare(got, query, store, lists, scale, softcap=None, padding_mask=None, error=None):
    """``got`` is right, to the rounding of the backend's own arithmetic."""
    seen = seen_tokens(store, lists, padding_mask)
    out, lse = attention(query, *store.read(0, store.length), scale, softcap, allowed=seen)
    assert isinstance(got, Attended) and isinstance(got.partial, Partial)
    assert got.partial.out.shape == query.shape and got.partial.lse.shape == query.shape[:3]
    assert got.tokens == int(seen.sum())
    empty = torch.isneginf(lse)
    assert torch.equal(torch.isneginf(got.partial.lse), empty) and not got.partial.out[empty].any()
    error = error or ERROR[got.partial.out.dtype]
    assert (got.partial.out - out).abs().max() <= error
    if not empty.all():
        assert (got.partial.lse - lse)[~empty].abs().max() <= min(10 * error, max(error, 2e-2))


def error_of(backend, dtype, kind):
    if backend.name == "native":
        return INT8_ERROR if kind is PackedKV else ERROR[torch.float32]
    return ERROR[dtype]


def random_padding(dice, store, kind):
    """Tokens that exist, some more than the store has; None for all."""
    generator = torch.Generator().manual_seed(dice.randrange(2**31))
    total = store.length + dice.randint(0, 9)
    if kind == "holes":
        return torch.rand(store.batch, total, generator=generator) > dice.choice([0.1, 0.9])
    starts = torch.tensor([dice.randint(0, store.length) for _ in range(store.batch)])
    if kind == "an empty row":
        starts[dice.randrange(store.batch)] = total
    return None if kind is None else torch.arange(total) >= starts[:, None]


@pytest.mark.parametrize("softcap", [None, 4.0])
@QUICK
@given(
    seed=st.integers(0, 10**6),
    group=st.sampled_from([1, 3, 4, 8]),
    chosen=st.sampled_from(["all", "lists", "ragged lists"]),
    padding=st.sampled_from([None, "left", "holes", "an empty row"]),
    chunk=st.sampled_from([8, 24, 1024]),
)
def test_attends_to_the_chosen_blocks(backend, softcap, seed, group, chosen, padding, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backend, "CHUNK_TOKENS", chunk)
        dice = random.Random(seed)
        size, heads = dice.choice([8, 16]), dice.choice([1, 2])
        store = make_store(dice.randint(1, 90), seed, size=size, heads=heads, batch=2 if heads == 2 else 4)
        lists = None if chosen == "all" else random_lists(dice, store, chosen == "ragged lists")
        query = make_query(group, seed, batch=store.batch, heads=heads)
        padding_mask = random_padding(dice, store, padding)
        got = backend.attend_blocks(query, store, lists, 0.3, softcap, padding_mask)
        compare(got, query, store, lists, 0.3, softcap, padding_mask)
        ticket = backend.start(query, store, lists, 0.3, softcap, padding_mask)
        compare(ticket.wait(), query, store, lists, 0.3, softcap, padding_mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kind", [PagedKV, PackedKV])
def test_every_dtype(backend, dtype, dim, kind):
    """Natively everything but int8 is computed as exactly as float32."""
    store, query = make_store(83, dtype=dtype, dim=dim, kind=kind), make_query(4, dtype=dtype, dim=dim)
    padding, error = random_padding(random.Random(0), store, "holes"), error_of(backend, dtype, kind)
    for lists in (None, random_lists(random.Random(0), store, True), random_lists(random.Random(3), store, False)):
        for padding_mask in (None, padding):
            got = backend.attend_blocks(query, store, lists, dim**-0.5, None, padding_mask)
            compare(got, query, store, lists, dim**-0.5, None, padding_mask, error)


@pytest.mark.parametrize("size", [32, 256])
@pytest.mark.parametrize("kind", [PagedKV, PackedKV])
def test_long_lists_in_several_pieces(backend, size, kind):
    store, query = make_store(3333, dtype=torch.bfloat16, size=size, kind=kind), make_query(3, dtype=torch.bfloat16)
    assert len(store.table.pool.slabs) > 2
    error, whole = error_of(backend, torch.bfloat16, kind), store.length // size
    for lists in (
        None,
        random_lists(random.Random(1), store, True),
        random_lists(random.Random(2), store, True, whole),
    ):
        for padding in (None, "left"):
            padding_mask = random_padding(random.Random(0), store, padding)
            got = backend.attend_blocks(query, store, lists, 0.4, None, padding_mask)
            compare(got, query, store, lists, 0.4, None, padding_mask, error)


def test_a_query_of_another_dtype_than_the_store():
    """Natively only; a model under autocast has such."""
    if not ISAS:
        pytest.skip("no native library")
    backend = make_backend("native")
    backend._torch = None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for other in (torch.float32, torch.bfloat16, torch.float16):
            store, query = make_store(83, dtype=dtype), make_query(4, dtype=other)
            compare(backend.attend_blocks(query, store, None, 0.3), query, store, None, 0.3)


def test_queries_and_lists_that_are_views(backend):
    """Models hand over (batch, 1, heads, head_dim) transposed; lists and padding may be parts of larger tensors."""
    store, dice = make_store(45), random.Random(0)
    wide = make_query(4).repeat(1, 1, 1, 2)
    lists, padding_mask = random_lists(dice, store, True), random_padding(dice, store, "holes")
    more_ids = lists.ids.repeat(1, 2, 1).transpose(0, 1).contiguous().transpose(0, 1)
    held = torch.cat([padding_mask.repeat(1, 2), padding_mask.repeat(1, 2)])[1::2]
    seen = padding_mask[[1, 1]]
    for query in (wide[..., :DIM], wide[..., ::2], wide.transpose(2, 3).contiguous().transpose(2, 3)[..., DIM:]):
        got = backend.attend_blocks(query, store, BlockLists(more_ids[:, :KV_HEADS], lists.counts), 0.3, None, held)
        compare(got, query, store, lists, 0.3, None, seen)
    one_list = BlockLists(torch.tensor([2, 0], dtype=torch.int32).expand(BATCH, KV_HEADS, 2), None)
    compare(backend.attend_blocks(query, store, one_list, 0.3), query, store, one_list, 0.3)


def test_counts_that_are_views(backend):
    store, query = make_store(45), make_query(2)
    ids = random_lists(random.Random(0), store, False, 4).ids
    counts = torch.arange(8, dtype=torch.int32).view(2, 4)[:, ::2]  # 0, 2; 4, 6
    lists = BlockLists(ids, counts.clamp(max=ids.shape[2]).T)
    assert not lists.counts.is_contiguous()
    compare(backend.attend_blocks(query, store, lists, 0.3), query, store, lists, 0.3)


def test_no_blocks_give_the_empty_partial(backend):
    query, counts = make_query(2), torch.zeros(BATCH, KV_HEADS, dtype=torch.int32)
    ids = torch.full((BATCH, KV_HEADS, 3), GARBAGE, dtype=torch.int32)
    empty_store = PagedKV(BATCH, KV_HEADS, DIM, SIZE, torch.float32, "cpu")
    nowhere = torch.zeros(BATCH, 20, dtype=torch.bool)
    for store, lists, padding_mask in (
        (empty_store, None, None),
        (make_store(20), BlockLists(ids, counts), None),
        (make_store(20), None, nowhere),
        (make_store(20), BlockLists(ids[:, :, :0], counts), None),
        (make_store(20), BlockLists(ids[:, :, :0], None), None),
        (empty_store, BlockLists(ids[:, :, :0], None), None),
    ):
        for got in (
            backend.attend_blocks(query, store, lists, 0.3, None, padding_mask),
            backend.start(query, store, lists, 0.3, None, padding_mask).wait(),
        ):
            assert got.tokens == 0 and not got.partial.out.any() and bool((got.partial.lse == -torch.inf).all())


def test_garbage_in_keys_is_not_hidden(backend):
    """NaN among what is attended reaches the result; among padding and unfilled places it does not."""
    keys = torch.randn(1, 1, 21, DIM, generator=torch.Generator().manual_seed(0))
    keys[0, 0, 9] = torch.nan
    for kind in (PagedKV, PackedKV):
        store = kind(1, 1, DIM, SIZE, torch.float32, "cpu")
        store.append(keys, keys.nan_to_num())
        query, lists = make_query(1, batch=1, heads=1), BlockLists(torch.tensor([[[0, 2]]], dtype=torch.int32), None)
        assert backend.attend_blocks(query, store, None, 0.3).partial.out.isnan().all()
        assert backend.attend_blocks(query, store, lists, 0.3).partial.out.isfinite().all()


def test_what_is_padding_may_be_garbage(backend):
    keys = torch.randn(2, KV_HEADS, 21, DIM, generator=torch.Generator().manual_seed(0))
    padding_mask = torch.arange(21) >= torch.tensor([[0], [11]])
    clean, dirty = (PagedKV(2, KV_HEADS, DIM, SIZE, torch.float32, "cpu") for _ in range(2))
    spoiled = keys.masked_fill(~padding_mask[:, None, :, None], 1e6)
    clean.append(keys, keys), dirty.append(spoiled, spoiled)
    results = [backend.attend_blocks(make_query(2), store, None, 0.3, None, padding_mask) for store in (clean, dirty)]
    assert_same(*results)


def test_results_outlive_the_buffers(backend):
    store, query = make_store(64), make_query(2)
    first = backend.attend_blocks(query, store, random_lists(random.Random(0), store, False, 3), 0.3)
    kept = [part.clone() for part in first.partial]
    other = make_store(64, 7)
    backend.attend_blocks(-query, other, random_lists(random.Random(1), other, False, 5), 0.3)
    assert all(torch.equal(a, b) for a, b in zip(first.partial, kept)) and bool(first.partial.out.isfinite().all())


def jobs_of_different_kinds():
    jobs = []
    for seed, (dtype, dim, kind) in enumerate(
        [(torch.float32, 16, PagedKV)] * 2 + [(torch.bfloat16, 64, PagedKV), (torch.float32, 16, PackedKV)]
    ):
        store, query = make_store(83, seed, dtype, dim, kind=kind), make_query(2, seed, dtype, dim)
        jobs.append((query, store, random_lists(random.Random(seed), store, True, 4 + seed), 0.3))
    return jobs


def test_one_backend_serves_threads_and_stores_of_different_kinds(backend, monkeypatch):
    jobs, errors = jobs_of_different_kinds(), []
    expected = [backend.attend_blocks(*job) for job in jobs]
    meeting, attend = threading.Barrier(len(jobs)), torch_backend.attend

    def meet_and_attend(*args):
        meeting.wait(60)  # with torch, all threads have their buffer filled before the first one attends
        return attend(*args)

    def work(job, wanted):
        try:
            for _ in range(3 if backend.name == "torch" else 100):
                assert_same(backend.attend_blocks(*job), wanted)
                if backend.name == "native":
                    assert_same(backend.start(*job).wait(), wanted)
        except BaseException as error:
            errors.append(error)
            meeting.abort()

    if backend.name == "torch":
        monkeypatch.setattr(torch_backend, "attend", meet_and_attend)
    threads = [threading.Thread(target=work, args=both) for both in zip(jobs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


def test_jobs_in_the_background_give_the_same_bits(backend):
    """Many at once, joined in any order, twice, or never; what they need is kept alive for them."""
    jobs = jobs_of_different_kinds()
    expected = [backend.attend_blocks(*job) for job in jobs]
    tickets = [backend.start(query.clone(), store, copy.deepcopy(lists), scale) for query, store, lists, scale in jobs]
    dropped = [backend.start(job[0].clone(), job[1].fork(), *job[2:]) for job in jobs]
    del dropped
    gc.collect()
    rubbish = [torch.full_like(job[0], torch.nan) for job in jobs for _ in range(20)]
    for index in (3, 0, 2, 1):
        assert_same(tickets[index].wait(), expected[index])
        assert tickets[index].done() and tickets[index].drain()
        assert_same(tickets[index].wait(), expected[index])
    assert rubbish
    backend.close()
    assert_same(backend.start(*jobs[0]).wait(), expected[0])


def test_a_background_job_of_a_store_whose_table_is_replaced(backend):
    """A fork that grows, and rows that move, leave the job its table."""
    store, query = make_store(83), make_query(4)
    expected = backend.attend_blocks(query, store, None, 0.3)
    twin = store.fork()
    ticket = backend.start(query, store, None, 0.3)
    twin.append(*torch.randn(2, BATCH, KV_HEADS, 300, DIM))
    twin.select_rows(torch.tensor([1, 0]))
    assert_same(ticket.wait(), expected)


def test_a_wrong_block_is_an_error_at_the_join():
    if not ISAS:
        pytest.skip("no native library")
    backend, store, query = make_backend("native"), make_store(83), make_query(4)
    for wrong in (11, GARBAGE, -1):
        lists = BlockLists(torch.full((BATCH, KV_HEADS, 1), wrong, dtype=torch.int32), None)
        with pytest.raises(RuntimeError, match="a block that is not there"):
            backend.attend_blocks(query, store, lists, 0.3)
        ticket = backend.start(query, store, lists, 0.3)
        with pytest.raises(RuntimeError, match="a block that is not there"):
            ticket.wait()
        assert ticket.drain()
    compare(backend.start(query, store, None, 0.3).wait(), query, store, None, 0.3)
    backend.close()


def test_an_error_in_a_torch_job_surfaces_at_the_join(monkeypatch):
    backend, store, query = make_backend("torch"), make_store(83), make_query(4)

    def fail(*args):
        raise ValueError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(torch_backend, "attend", fail)
        ticket = backend.start(query, store, None, 0.3)
        with pytest.raises(ValueError, match="planted"):
            ticket.wait()
        assert not ticket.drain()
    compare(backend.start(query, store, None, 0.3).wait(), query, store, None, 0.3)
    backend.close()


@pytest.mark.skipif(not ISAS, reason="no native library")
class TestTheTeamOfThreads:
    """A native call uses as many threads as torch does, and gives the same bits whoever computes what."""

    @pytest.fixture
    def threads(self):
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)
        native.load_library().set_team(native._openmp_entry())

    @pytest.fixture(params=[PagedKV, PackedKV])
    def job(self, request):
        store = make_store(3333, dtype=torch.bfloat16, dim=64, size=32, kind=request.param)
        return make_query(4, dtype=torch.bfloat16, dim=64), store, random_lists(random.Random(0), store, True), 0.1

    @pytest.mark.parametrize("isa", ISAS)
    def test_the_same_bits_on_one_thread_and_on_two(self, threads, job, isa):
        backend, found = make_backend("native"), []
        with using_isa(isa):
            for number in (1, 2):
                torch.set_num_threads(number)
                found.append(backend.attend_blocks(*job))
        assert_same(*found)

    def test_the_same_bits_however_the_work_is_shared_out(self, threads, job):
        """A team made of Python threads: the library asks for it once, and finds its work done by all of them."""
        backend = make_backend("native")
        expected, asked = backend.attend_blocks(*job), []

        @ctypes.CFUNCTYPE(None, ctypes.CFUNCTYPE(None, ctypes.c_void_p), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        def team(work, context, number, flags):
            asked.append(number)
            workers = [threading.Thread(target=work, args=(context,)) for _ in range(number)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

        native.load_library().set_team(ctypes.cast(team, ctypes.c_void_p))
        for number in (2, 3):
            torch.set_num_threads(number)
            for _ in range(5):
                assert_same(backend.attend_blocks(*job), expected)
        assert asked == [2] * 5 + [3] * 5

    def test_little_work_asks_for_no_team(self, threads):
        backend, store, query = make_backend("native"), make_store(20), make_query(1)
        torch.set_num_threads(2)
        native.load_library().set_team(ctypes.c_void_p(1))  # to call it would crash
        compare(backend.attend_blocks(query, store, None, 0.3), query, store, None, 0.3)

    def test_torch_s_own_team_is_the_one_in_use(self):
        assert native._openmp_entry(), "torch has an OpenMP library, but its entry was not found"


@pytest.mark.parametrize(
    ("dtype", "dim", "served"),
    [(torch.float32, 16, True), (torch.bfloat16, 128, True), (torch.float64, 16, False), (torch.float32, 20, False)],
    ids=str,
)
def test_the_native_backend_asks_torch_for_what_it_does_not_know(monkeypatch, dtype, dim, served):
    if not ISAS:
        pytest.skip("no native library")
    asked, real = [], torch_backend.TorchBackend.attend_blocks
    spy = lambda self, *args: asked.append(None) or real(self, *args)  # noqa: E731
    monkeypatch.setattr(torch_backend.TorchBackend, "attend_blocks", spy)
    backend, store, query = make_backend("native"), make_store(83, 0, dtype, dim), make_query(4, 0, dtype, dim)
    lists = random_lists(random.Random(0), store, True)
    compare(backend.attend_blocks(query, store, lists, 0.1), query, store, lists, 0.1)
    compare(backend.start(query, store, lists, 0.1).wait(), query, store, lists, 0.1)
    assert asked == [None] * 2 * (not served)
    backend.close()


def test_a_native_backend_made_without_the_library_is_a_torch_one():
    store, query = make_store(83), make_query(4)
    with without_library():
        backend = native_backend.NativeBackend()
        for got in (backend.attend_blocks(query, store, None, 0.3), backend.start(query, store, None, 0.3).wait()):
            compare(got, query, store, None, 0.3)
        assert backend.select("minmax", query, torch.zeros(2, 2, 4, 32), 2, 0, 0, SIZE, None) is None
        backend.close()


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("chunk", [16, 1024])
@pytest.mark.parametrize("dim", [20, 64])
def test_torch_with_every_dtype_and_chunk(dtype, chunk, dim, monkeypatch):
    monkeypatch.setattr(torch_backend, "CHUNK_TOKENS", chunk)
    store, query = make_store(83, dtype=dtype, dim=dim), make_query(4, dtype=dtype, dim=dim)
    for ragged in (False, True):
        lists = random_lists(random.Random(0), store, ragged)
        got = make_backend("torch").attend_blocks(query, store, lists, dim**-0.5)
        compare(got, query, store, lists, dim**-0.5, error=ERROR[dtype])


def test_chunks_are_no_longer_than_asked_by_half(monkeypatch):
    monkeypatch.setattr(torch_backend, "CHUNK_TOKENS", 32)
    store, sizes = make_store(25 * SIZE), []
    gather = PagedKV.gather
    monkeypatch.setattr(
        PagedKV, "gather", lambda self, ids, *out: (sizes.append(ids.shape[2]), gather(self, ids, *out))
    )
    for count in range(1, 25):
        sizes.clear()
        lists = BlockLists(torch.arange(count, dtype=torch.int32).expand(BATCH, KV_HEADS, -1), None)
        make_backend("torch").attend_blocks(make_query(1), store, lists, 0.3)
        assert sum(sizes) == count and max(sizes) * SIZE <= 1.5 * 32 and max(sizes) - min(sizes) <= len(sizes)


def test_a_missing_block_is_seen(backend):
    """The comparison of these tests can fail."""
    store, query = make_store(83), make_query(4)
    lists = random_lists(random.Random(0), store, True, 6)
    got = backend.attend_blocks(query, store, BlockLists(lists.ids, lists.counts - 1), 0.3)
    with pytest.raises(AssertionError):
        compare(got, query, store, lists, 0.3)
    with pytest.raises(AssertionError):
        compare(Attended(got.partial, int(seen_tokens(store, lists).sum())), query, store, lists, 0.3)


def test_names_and_copies(any_backend):
    assert {"auto", "torch", "native"} <= set(backend_names())
    assert isinstance(any_backend, CpuBackend) and type(make_backend()).name == ("native" if ISAS else "torch")
    with pytest.raises(ConfigError, match="cpu_backend='cuda' is not known; available are 'auto', .*'torch'"):
        make_backend("cuda")
    with without_library():
        assert make_backend().name == "torch"
        with pytest.raises(ConfigError, match="cpu_backend='native' is not possible: .*reinstall.*cpu_backend='auto'"):
            make_backend("native")
    job = (make_query(1), make_store(20), None, 0.3)
    expected = any_backend.start(*job).wait()
    for twin in (copy.deepcopy(any_backend), pickle.loads(pickle.dumps(any_backend))):
        assert type(twin) is type(any_backend) and twin.threads == any_backend.threads
        assert_same(twin.attend_blocks(*job), expected)
        assert_same(twin.start(*job).wait(), expected)
        twin.close()


def test_threads_of_the_background_are_kept_by_copies():
    for name in ("torch", "native") if ISAS else ("torch",):
        assert copy.deepcopy(make_backend(name, 3)).threads == 3


@pytest.mark.skipif(not ISAS, reason="no native library")
def test_a_job_that_a_closed_pool_dropped_says_so():
    backend = make_backend("native")
    word = held_back(backend)
    ticket = backend.start(make_query(1), make_store(20), None, 0.3)
    assert not ticket.done() and not word.value
    backend.close()
    with pytest.raises(CacheStateError, match="never run"):
        ticket.wait()
    assert not ticket.drain()


@pytest.mark.skipif(not ISAS, reason="no native library")
def test_a_job_outlives_its_store():
    """An interrupt may lose the ticket of a job whose cache is then freed: in a separate process, which may crash."""
    code = """
import gc, torch
from scout_hf.kernels.cpu import make_backend
from scout_hf.stores import PackedKV, PagedKV
from tests.unit.attending import assert_same, held_back, make_query
backend = make_backend("native")
for kind in (PagedKV, PackedKV):
    store, query = kind(2, 2, 128, 32, torch.float32, "cpu"), make_query(4, dim=128)
    store.append(*torch.randn(2, 2, 2, 9000, 128))
    assert store.table.pool.slabs[-1].nbytes > 4 << 20  # large enough to be unmapped when it goes
    expected = backend.attend_blocks(query, store, None, 0.1)
    word = held_back(backend)
    ticket = backend.start(query, store, None, 0.1)
    del store
    gc.collect()
    word.value = 1
    assert_same(ticket.wait(), expected)
    del backend._pool.submit
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr or ran.returncode
