"""The backend on Intel's extension for PyTorch, against float64 where that is installed; its refusal everywhere."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import threading
from importlib import metadata
from importlib.util import find_spec

import pytest
import torch

from scout_hf import ConfigError
from scout_hf.kernels.cpu import ipex_backend
from scout_hf.kernels.cpu.backend import BlockLists
from scout_hf.kernels.cpu.ipex_backend import IpexBackend
from scout_hf.kernels.cpu.torch_backend import TorchBackend
from scout_hf.stores import PagedKV, pages
from scout_hf.stores.packed import PackedKV
from tests.unit.naive import attention

ERROR = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DISTRIBUTION = "intel_extension_for_pytorch"

installed = pytest.mark.skipif(find_spec(DISTRIBUTION) is None, reason="needs intel-extension-for-pytorch")


@pytest.fixture
def backend():
    return IpexBackend()


def make_store(tokens, size=16, dtype=torch.float32, dim=64, batch=2, heads=2, step=None, seed=0, kind=PagedKV):
    generator = torch.Generator().manual_seed(seed)
    store = kind(batch, heads, dim, size, dtype, "cpu")
    for first in range(0, tokens, step or tokens):
        count = min(step or tokens, tokens - first)
        store.append(*torch.randn(2, batch, heads, count, dim, generator=generator).to(dtype))
    return store


def make_query(store, group=4, seed=0):
    generator = torch.Generator().manual_seed(seed + 99)
    query = torch.randn(store.batch, store.heads * group, 1, store.head_dim, generator=generator)
    return query.to(store.dtype)


def pick(store, seed=0, ragged=True):
    """Random lists, the last block last, of random lengths down to none."""
    dice, shape = random.Random(seed), (store.batch, store.heads)
    most = store.blocks * 3 // 4
    counts = [dice.randint(0, most) if ragged else most for _ in range(shape[0] * shape[1])]
    if ragged:
        counts[0], counts[-1] = 0, most
    ids = [dice.sample(range(store.blocks - 1), count) + [0] * (most - count) for count in counts]
    for entries, count in zip(ids, counts):
        if count and dice.random() < 0.7:
            entries[count - 1] = store.blocks - 1
    ids, counts = (torch.tensor(numbers, dtype=torch.int32) for numbers in (ids, counts))
    return BlockLists(ids.view(*shape, most), counts.view(shape) if ragged else None)


def spoilt(lists):
    """The same lists with unused ends that are no block numbers at all."""
    return BlockLists(
        lists.ids.masked_fill(torch.arange(lists.ids.shape[2]) >= lists.counts[..., None], 2**30), lists.counts
    )


def marked(store, lists):
    """(batch, kv_heads, 1, tokens): what the lists stand for."""
    if lists is None:
        return torch.ones(store.batch, store.heads, 1, store.length, dtype=torch.bool)
    seen = torch.zeros(store.batch, store.heads, 1, store.length, dtype=torch.bool)
    for row in range(store.batch):
        for head in range(store.heads):
            count = None if lists.counts is None else int(lists.counts[row, head])
            for block in lists.ids[row, head, :count].tolist():
                seen[row, head, 0, block * store.block_size : (block + 1) * store.block_size] = True
    return seen


def compare(backend, query, store, lists, scale=0.1, softcap=None, padding_mask=None):
    got, tokens = backend.attend_blocks(query, store, lists, scale, softcap, padding_mask)
    seen = marked(store, lists)
    if padding_mask is not None:
        seen &= padding_mask[:, None, None, : store.length]
    out, lse = attention(query, *store.read(0, store.length), scale, softcap, seen)
    empty = torch.isneginf(lse)
    assert got.out.shape == query.shape and got.out.dtype in (query.dtype, torch.float32)
    assert got.lse.shape == query.shape[:3] and got.lse.dtype == torch.float32
    assert torch.equal(torch.isneginf(got.lse), empty) and bool((got.out[empty] == 0).all())
    assert (got.out - out).abs().max() <= ERROR[query.dtype]
    assert bool(((got.lse - lse)[~empty].abs() <= 1e-5).all())
    assert tokens == int(seen.sum())


@pytest.fixture
def no_fallback(monkeypatch):
    def refuse(*args):
        raise AssertionError("this was for the kernel to do")

    monkeypatch.setattr(ipex_backend.TorchBackend, "attend_blocks", refuse)


@installed
@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("tokens", [7, 64, 500, 1111])
def test_close_to_float64(backend, no_fallback, tokens, size, group, dtype):
    store = make_store(tokens, size, dtype)
    query = make_query(store, group)
    for lists in (None, spoilt(pick(store, tokens)), pick(store, tokens, ragged=False)):
        compare(backend, query, store, lists)


@installed
@pytest.mark.parametrize("size, dim, group", [(1, 32, 2), (8, 20, 3), (64, 128, 7), (128, 256, 1), (32, 96, 16)])
def test_odd_shapes(backend, no_fallback, size, dim, group):
    store = make_store(777, size, dim=dim)
    compare(backend, make_query(store, group), store, pick(store))


@installed
@pytest.mark.parametrize("scale", [1e-3, 3.0, 60.0])
def test_scores_from_flat_to_extreme(backend, no_fallback, scale):
    store = make_store(600, dim=16)
    got, _ = backend.attend_blocks(make_query(store), store, None, scale)
    out, lse = attention(make_query(store), *store.read(0, 600), scale)
    assert (got.out - out).abs().max() <= 1e-6 * (1 + scale * 10)
    assert ((got.lse - lse) / lse.abs().clamp(min=1)).abs().max() <= 1e-6


@installed
@pytest.mark.parametrize("heads, batch", [(1, 3), (2, 2), (1, 8)])
def test_soft_cap(backend, heads, batch):
    store = make_store(333, heads=heads, batch=batch)
    for lists in (None, pick(store)):
        compare(backend, make_query(store), store, lists, 1.0, 5.0)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@installed
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_rows_that_begin_with_the_same_page_are_no_beams_of_one_length(backend, one_thread, softcap):
    store = make_store(400, batch=1, heads=1)
    store.select_rows(torch.zeros(16, dtype=torch.int64))
    lists = BlockLists(torch.arange(store.blocks).expand(16, 1, -1).int(), torch.arange(1, 17).view(16, 1).int())
    compare(backend, make_query(store), store, lists, softcap=softcap)


@installed
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_pages_in_several_slabs(backend, no_fallback, monkeypatch, softcap):
    monkeypatch.setattr(pages, "MIN_SLAB_PAGES", 5)
    store = make_store(500, step=37)
    assert len(store.table.pool.slabs) > 2
    for lists in (None, pick(store), pick(store, ragged=False)):
        compare(backend, make_query(store), store, lists, softcap=softcap)


@installed
def test_no_blocks_give_the_empty_partial(backend, no_fallback):
    store = make_store(100)
    query = make_query(store)
    none = torch.zeros(2, 2, 3, dtype=torch.int32)
    for lists in (BlockLists(none, none[..., 0]), BlockLists(none[..., :0], None)):
        compare_empty(*backend.attend_blocks(query, store, lists, 0.1))
    compare_empty(*backend.attend_blocks(query, PagedKV(2, 2, 64, 16, torch.float32, "cpu"), None, 0.1))


def compare_empty(got, tokens):
    assert tokens == 0 and not got.out.any() and bool((got.lse == -torch.inf).all())


@installed
def test_torch_does_what_the_kernel_cannot(backend):
    store = make_store(90)
    padding_mask = torch.arange(95) >= torch.tensor([[0], [40]])
    compare(backend, make_query(store), store, pick(store), padding_mask=padding_mask)
    for size in (24, 256):
        store = make_store(600, size)
        compare(backend, make_query(store), store, None)
    store = make_store(60, dtype=torch.float64)
    got, _ = backend.attend_blocks(make_query(store), store, None, 0.1)
    out, _ = attention(make_query(store), *store.read(0, 60), 0.1)
    assert (got.out - out).abs().max() <= 1e-12
    store = make_store(64, 16, torch.bfloat16, kind=PackedKV)
    got, _ = backend.attend_blocks(make_query(store), store, None, 0.1)
    expected, _ = TorchBackend().attend_blocks(make_query(store), store, None, 0.1)
    assert torch.equal(got.out, expected.out) and torch.equal(got.lse, expected.lse)


@installed
def test_marks_of_which_none_is_padding(backend, no_fallback):
    store = make_store(90)
    padding_mask = torch.arange(95).expand(2, -1) < 90
    compare(backend, make_query(store), store, pick(store), padding_mask=padding_mask)


@installed
def test_strided_queries_and_inference_mode(backend, no_fallback):
    store = make_store(300)
    query = make_query(store).transpose(1, 2).contiguous().transpose(1, 2)
    with torch.inference_mode():
        compare(backend, query, store, pick(store))
    compare(backend, query.repeat_interleave(2, -1)[..., ::2], store, pick(store))


@installed
def test_threads_share_a_backend(backend, no_fallback):
    jobs, errors = [], []
    for seed in range(4):
        store = make_store(300 + 16 * seed, seed=seed)
        jobs.append((make_query(store, seed=seed), store, pick(store, seed), 0.1))
    expected = [backend.attend_blocks(*job)[0] for job in jobs]

    def work(job, wanted):
        try:
            for _ in range(20):
                got, _ = backend.attend_blocks(*job)
                assert all(torch.equal(one, other) for one, other in zip(got, wanted))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=both) for both in zip(jobs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


@installed
def test_other_threads_may_compile_meanwhile():
    with ipex_backend._Allocations():
        assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode(include_infra_modes=False)


@installed
def test_survives_pickling(backend, no_fallback):
    store = make_store(50)
    compare(pickle.loads(pickle.dumps(backend)), make_query(store), store, None)


@installed
def test_a_kernel_with_other_scratch_is_refused(backend, monkeypatch):
    monkeypatch.setattr(ipex_backend, "PARTITION", 16)
    store = make_store(50)
    with pytest.raises(ConfigError, match="another kernel.*cpu_backend='auto'"):
        backend.attend_blocks(make_query(store), store, None, 0.1)


@pytest.mark.parametrize("torch_version, found", [("2.13.0", None), ("2.8.0", None), ("2.8.0", "2.7.0")])
def test_says_what_is_missing(monkeypatch, torch_version, found):
    check_refusal(monkeypatch, torch_version, found)


def test_another_torch_is_refused_before_the_extension_is_imported(monkeypatch):
    check_refusal(monkeypatch, "2.13.0+cpu", "2.8.0")


def check_refusal(monkeypatch, torch_version, found):
    def version(name):
        if name != DISTRIBUTION or found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(torch, "__version__", torch_version)
    monkeypatch.setattr(ipex_backend.importlib, "import_module", lambda name: pytest.fail("imported"))
    with pytest.raises(ConfigError) as caught:
        IpexBackend()
    for part in (
        "needs torch 2.8 ",
        f"found torch {torch_version}",
        f"pytorch {found}" if found else "no intel",
        "cpu_backend='auto'",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("error", [ImportError("libx.so"), SystemExit(127), AttributeError("exit")])
def test_an_extension_that_does_not_load_is_a_config_error(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(metadata, "version", lambda name: "2.8.0+cpu")
    monkeypatch.setattr(torch, "__version__", "2.8.0+cpu")
    monkeypatch.setattr(ipex_backend.importlib, "import_module", fail)
    with pytest.raises(ConfigError, match="do not load.*cpu_backend='auto'") as caught:
        IpexBackend()
    assert caught.value.__cause__ is error


def test_nobody_imports_the_extension_unasked():
    code = f"import sys, scout_hf.kernels.cpu.ipex_backend, scout_hf; assert {DISTRIBUTION!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
