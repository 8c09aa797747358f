"""Attention over chosen host blocks, and the CPU's share of a step, against float64."""

from __future__ import annotations

import copy
import pickle
import random
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scout_hf import ConfigError
from scout_hf.kernels.cpu import backend_names, make_backend, torch_backend
from scout_hf.methods.base import Scoring
from scout_hf.methods.scout import cpu_share
from scout_hf.stores import PagedKV, pages
from tests.unit.naive import QUICK, attention, poison

BATCH, KV_HEADS, SIZE = 2, 2, 8
ERROR = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def poisoned_small_slabs(monkeypatch):
    monkeypatch.setattr(pages, "MIN_SLAB_PAGES", 5)
    poison(monkeypatch)


def make_store(tokens, seed=0, dtype=torch.float32, dim=16, batch=BATCH):
    generator = torch.Generator().manual_seed(seed)
    store = PagedKV(batch, KV_HEADS, dim, SIZE, dtype, "cpu")
    for first in range(0, tokens, 13):
        count = min(13, tokens - first)
        store.append(*torch.randn(2, batch, KV_HEADS, count, dim, generator=generator).to(dtype))
    return store


def make_query(group, seed=0, dtype=torch.float32, dim=16, batch=BATCH):
    generator = torch.Generator().manual_seed(seed + 99)
    return torch.randn(batch, KV_HEADS * group, 1, dim, generator=generator).to(dtype)


def marked(store, ids, counts=None, allowed=None):
    """(batch, kv_heads, 1, tokens): the tokens that a list of blocks, or its usable entries, stands for."""
    seen = torch.zeros(*ids.shape[:2], 1, store.length, dtype=torch.bool)
    for row in range(ids.shape[0]):
        for head in range(ids.shape[1]):
            for place, block in enumerate(ids[row, head].tolist()):
                if counts is None or counts[row, head, place]:
                    part = seen[row, head, 0, block * SIZE : (block + 1) * SIZE]
                    part |= True if allowed is None else allowed[row, head, place, : len(part)]
    return seen


def compare(got, query, store, seen, scoring):
    out, lse = attention(query, *store.read(0, store.length), *scoring, allowed=seen)
    empty = torch.isneginf(lse)
    assert torch.equal(torch.isneginf(got.lse), empty) and bool((got.out[empty] == 0).all())
    tolerance = ERROR[query.dtype]
    assert (got.out - out).abs().max() <= tolerance
    assert (got.lse - lse)[~empty].abs().max() <= 10 * tolerance if not empty.all() else True


def lists(dice, blocks, count, last):
    """Distinct blocks per row and head; the store's last one, if asked for, stands last everywhere."""
    found = [
        [dice.sample(range(blocks - last), count) + [blocks - 1] * last for _ in range(KV_HEADS)] for _ in range(BATCH)
    ]
    return torch.tensor(found)


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("chunk", [8, 24, 1024])
@QUICK
@given(seed=st.integers(0, 10**6), group=st.sampled_from([1, 2, 4]), masked=st.booleans())
def test_attends_to_the_chosen_blocks(chunk, softcap, seed, group, masked):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backend, "CHUNK_TOKENS", chunk)
        dice = random.Random(seed)
        store = make_store(dice.randint(2 * SIZE, 90), seed)
        unfilled = store.blocks * SIZE - store.length
        ids = lists(dice, store.blocks, dice.randint(1, store.blocks - 1), True)
        allowed = torch.rand(*ids.shape, SIZE, generator=torch.Generator().manual_seed(seed)) > 0.5 if masked else None
        if masked:
            allowed[0, 1, :2] = False
            allowed[1] &= dice.random() > 0.3
        query, scoring = make_query(group, seed), Scoring(0.3, softcap)
        got = make_backend("torch").attend_blocks(query, store, ids, unfilled, *scoring, allowed)
        assert got.out.shape == query.shape and got.lse.shape == query.shape[:3]
        compare(got, query, store, marked(store, ids, allowed=allowed), scoring)


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("chunk", [16, 1024])
@pytest.mark.parametrize("dim", [20, 64, 128])
def test_every_dtype(dtype, chunk, dim, monkeypatch):
    monkeypatch.setattr(torch_backend, "CHUNK_TOKENS", chunk)
    store, query = make_store(83, dtype=dtype, dim=dim), make_query(4, dtype=dtype, dim=dim)
    ids = lists(random.Random(0), store.blocks, 6, True)
    scoring = Scoring(dim**-0.5, None)
    got = make_backend().attend_blocks(query, store, ids, store.blocks * SIZE - 83, *scoring)
    compare(got, query, store, marked(store, ids), scoring)


def test_chunks_are_no_longer_than_asked_by_half(monkeypatch):
    monkeypatch.setattr(torch_backend, "CHUNK_TOKENS", 32)
    store, sizes = make_store(25 * SIZE), []
    gather = PagedKV.gather
    monkeypatch.setattr(
        PagedKV, "gather", lambda self, ids, *out: (sizes.append(ids.shape[2]), gather(self, ids, *out))
    )
    for count in range(1, 25):
        sizes.clear()
        ids = lists(random.Random(0), 25, count, False)
        make_backend().attend_blocks(make_query(1), store, ids, 0, 0.3)
        assert sum(sizes) == count and max(sizes) * SIZE <= 1.5 * 32 and max(sizes) - min(sizes) <= len(sizes)


def test_no_blocks_give_the_empty_partial():
    query = make_query(2)
    ids = torch.empty(BATCH, KV_HEADS, 0, dtype=torch.int64)
    for store in (make_store(20), PagedKV(BATCH, KV_HEADS, 16, SIZE, torch.float32, "cpu")):
        out, lse = make_backend().attend_blocks(query, store, ids, 0, 0.3)
        assert torch.equal(out, torch.zeros_like(query)) and bool((lse == -torch.inf).all())


def test_results_outlive_the_buffers():
    backend, store, query = make_backend(), make_store(64), make_query(2)
    first = backend.attend_blocks(query, store, lists(random.Random(0), 8, 3, False), 0, 0.3)
    kept = [part.clone() for part in first]
    backend.attend_blocks(-query, make_store(64, 7), lists(random.Random(1), 8, 5, False), 0, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(first, kept)) and bool(torch.isfinite(first.out).all())


def test_one_backend_serves_threads_and_stores_of_different_kinds(monkeypatch):
    backend, errors = make_backend(), []
    jobs = []
    for seed, (dtype, dim) in enumerate([(torch.float32, 16)] * 3 + [(torch.bfloat16, 64)]):
        store, query = make_store(83, seed, dtype, dim), make_query(2, seed, dtype, dim)
        ids = lists(random.Random(seed), store.blocks, 4 + seed, True)
        jobs.append((query, store, ids, 88 - 83, 0.3))
    expected = [backend.attend_blocks(*job) for job in jobs]

    meeting, gather = threading.Barrier(len(jobs)), PagedKV.gather

    def gather_and_meet(*args):
        gather(*args)
        meeting.wait(60)  # all threads have their buffer filled before the first one attends

    def work(job, wanted):
        try:
            for _ in range(3):
                got = backend.attend_blocks(*job)
                assert all(torch.equal(a, b) for a, b in zip(got, wanted))
        except BaseException as error:
            errors.append(error)
            meeting.abort()

    monkeypatch.setattr(PagedKV, "gather", gather_and_meet)
    threads = [threading.Thread(target=work, args=both) for both in zip(jobs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


@QUICK
@given(seed=st.integers(0, 10**6), group=st.sampled_from([1, 4]), padded=st.booleans(), dense=st.booleans())
def test_the_share_is_attention_over_what_is_missing(seed, group, padded, dense):
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    store = make_store(dice.randint(2, 11) * SIZE, seed)
    ids = lists(dice, store.blocks, dice.randint(1, store.blocks), False)
    missing = torch.rand(ids.shape, generator=generator) < (2 if dense else dice.random())
    tokens = None
    if padded:
        starts = torch.tensor([dice.randint(0, store.length) for _ in range(BATCH)])
        tokens = (torch.arange(store.length) >= starts[:, None]).view(BATCH, -1, SIZE)
    query, scoring = make_query(group, seed), Scoring(0.3, dice.choice([None, 5.0]))
    share = cpu_share(make_backend(), store, query, ids, missing, tokens, scoring)
    seen = marked(store, ids, missing)
    if padded:
        seen &= tokens.view(BATCH, 1, 1, -1)
    assert share.blocks == int(missing.sum())
    assert share.tokens == int(seen.sum())
    if share.partial is None:
        assert not missing.any()
    else:
        compare(share.partial, query, store, seen, scoring)


def test_heads_with_nothing_missing_get_the_empty_partial():
    store, query = make_store(40), make_query(2)
    ids = torch.arange(3).expand(BATCH, KV_HEADS, 3)
    missing = torch.zeros_like(ids, dtype=torch.bool)
    missing[1, 0, 2] = True
    share = cpu_share(make_backend(), store, query, ids, missing, None, Scoring(0.3, None))
    assert (share.blocks, share.tokens) == (1, SIZE)
    compare(share.partial, query, store, marked(store, ids, missing), Scoring(0.3, None))
    nothing = cpu_share(make_backend(), store, query, ids, ~missing & missing, None, Scoring(0.3, None))
    assert nothing == (None, 0, 0)
    none_chosen = cpu_share(make_backend(), store, query, ids[:, :, :0], missing[:, :, :0], None, Scoring(0.3, None))
    assert none_chosen == (None, 0, 0)


def test_names_and_copies():
    assert "auto" in backend_names() and "torch" in backend_names()
    for name in backend_names():
        assert hasattr(make_backend(name), "attend_blocks")
    with pytest.raises(ConfigError, match="cpu_backend='cuda' is not known; available are 'auto', .*'torch'"):
        make_backend("cuda")
    backend, store, query = make_backend("torch"), make_store(20), make_query(1)
    job = (query, store, torch.zeros(BATCH, KV_HEADS, 1, dtype=torch.int64), 0, 0.3)
    expected = backend.attend_blocks(*job)
    for twin in (copy.deepcopy(backend), pickle.loads(pickle.dumps(backend))):
        assert all(torch.equal(a, b) for a, b in zip(twin.attend_blocks(*job), expected))
