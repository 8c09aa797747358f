"""What reaches native code by address must be what it is taken for, wherever it comes from."""

from __future__ import annotations

import pytest
import torch

import scout_hf
from scout_hf.errors import NativeInputError
from scout_hf.fusion import Partial
from scout_hf.kernels.cpu import BlockLists, pages
from scout_hf.kernels.cpu.each_block import attend_each_native
from scout_hf.kernels.cpu.native_backend import NativeBackend
from scout_hf.stores import PackedKV, PagedKV
from scout_hf.stores.snapshot import WholeBlocks
from tests.integration.common import assert_equal, left_padded, llama, prompt, run
from tests.libraries import ISAS

SPARSE = {"budget": 24, "block_size": 8, "window": 8, "layer_ahead": False}


@pytest.mark.parametrize("split", ["off", "cpu"])
def test_a_mask_that_is_not_contiguous(split):
    model, inputs = llama(), left_padded(0, 13, tokens=60)
    turned = inputs | {"attention_mask": inputs["attention_mask"].t().contiguous().t()}
    with scout_hf.patch(model, **SPARSE, split=split):
        assert_equal(run(model, turned), run(model, inputs))


def test_a_mask_with_too_few_rows():
    model = llama()
    with scout_hf.patch(model, **SPARSE) as handle, torch.no_grad():
        with pytest.raises(scout_hf.UnsupportedInputError, match="1 rows, the inputs have 2"):
            model(prompt(2), attention_mask=torch.ones(1, 50), past_key_values=handle.new_cache())


@pytest.mark.parametrize("kind", [PagedKV, PackedKV])
def test_another_default_device(kind):
    """Scripts set one; what native code reads must be in host memory all the same."""
    keys = torch.randn(2, 1, 2, 40, 16)
    with torch.device("meta"):
        store = kind(1, 2, 16, 8, torch.float32, torch.device("cpu"))
        store.append(*keys[:, :, :, :29])
        twin = store.fork()
        store.append(*keys[:, :, :, 29:])
        twin.crop(11)
    assert (store.read(0, 40)[0] - keys[0]).abs().max() < 0.1 and twin.length == 11


@pytest.mark.parametrize("kind", [PagedKV, PackedKV])
def test_blocks_that_are_not_there(kind):
    store = kind(1, 2, 16, 8, torch.float32, "cpu")
    store.append(*torch.randn(2, 1, 2, 40, 16))
    with pytest.raises((RuntimeError, IndexError)):
        store.read(0, 100_000)


def test_a_step_taken_back_leaves_int8_as_it_was():
    store = PackedKV(1, 2, 16, 8, torch.float32, "cpu")
    keys = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    store.append(keys[:, :, :31], keys[:, :, :31])
    before = store.read(24, 31)
    store.append(keys[:, :, 31:32], keys[:, :, 31:32])
    store.crop(31)
    assert all(torch.equal(a, b) for a, b in zip(store.read(24, 31), before))


def test_an_append_that_fails_leaves_int8_as_it_was(monkeypatch):
    store = PackedKV(1, 2, 16, 8, torch.float32, "cpu")
    keys = torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(0))
    store.append(keys[:, :, :13], keys[:, :, :13])
    before = store.read(8, 13)
    real = PagedKV.append

    def interrupted(self, keys, values):
        length = self.length
        real(self, keys, values)
        self.length = length
        raise KeyboardInterrupt

    monkeypatch.setattr(PagedKV, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.append(keys[:, :, 13:], keys[:, :, 13:])
    assert all(torch.equal(a, b) for a, b in zip(store.read(8, 13), before))


TOKENS, BLOCKS = 40, 5


class Native:
    """Every way into the library, with all that it reads right until a test changes one thing."""

    def __init__(self):
        self.store = PagedKV(1, 2, 16, 8, torch.float32, "cpu")
        self.given = {
            "keys": torch.zeros(1, 2, TOKENS, 16),
            "values": torch.zeros(1, 2, TOKENS, 16),
            "query": torch.zeros(1, 4, 1, 16),
            "padding_mask": torch.ones(1, TOKENS, dtype=torch.bool),
            "ids": torch.zeros(1, 2, 3, dtype=torch.int64),
            "into": torch.zeros(1, 2, 3, 8, 16),
            "out": torch.zeros(1, 4, 1, 16),
            "lse": torch.zeros(1, 4, 1),
            "codes": torch.zeros(1, 2, BLOCKS, 32),
            "digests": torch.zeros(1, 2, BLOCKS, 32),
            "word": torch.ones(3, dtype=torch.int64),
            "sources": torch.zeros(0, dtype=torch.int64),
            "targets": torch.zeros(0, dtype=torch.int64),
            "marks": torch.ones(BLOCKS, 8, dtype=torch.bool),
        }
        self.store.append(self.given["keys"], self.given["values"])
        self.backend = NativeBackend()

    def append(self, keys, values):
        self.store._reserve(TOKENS)
        pages.append(self.store.library, self.store.native(), keys, values)

    def gather(self, ids, into):
        self.store.gather(ids, into, torch.zeros(1, 2, 3, 8, 16))

    def minmax(self, codes, padding_mask):
        pages.minmax(self.store.library, self.store.native(), 0, BLOCKS, padding_mask, codes)

    def attend(self, query, padding_mask):
        self.backend.attend_blocks(query, self.store, None, 1.0, None, padding_mask)

    def attend_at(self, query, out, lse, word):
        lists = BlockLists(torch.zeros(1, 2, 1, dtype=torch.int32), torch.ones(1, 2, dtype=torch.int32))
        words, chosen = (word[:1], word[1:2], word[2:]), torch.ones(1, 2, dtype=torch.int32)
        job = self.backend.prepare(words, Partial(out, lse), query, lists, chosen, layer=0)
        job.describe(self.store, 1.0, None, None)
        self.backend.start_step(self.backend.together([job])).drain()

    def select(self, query, digests, padding_mask):
        self.backend.select("minmax", query, digests, 2, 1, 0, 8, padding_mask)

    def copy(self, sources, targets):
        self.backend.copy(sources, targets, 8, ()).wait()

    def attend_each(self, query, marks):
        attend_each_native(query[0, :2, 0], WholeBlocks(self.store), 0, 0, 1.0, None, marks, None)


def halved(tensor):
    return tensor.to(torch.int32) if tensor.dtype == torch.int64 else tensor.to(torch.float16)


def doubled(tensor):
    return tensor.to(torch.float64)


def elsewhere(tensor):
    return tensor.to("meta")


def turned(tensor):
    """The same numbers in the opposite order of memory."""
    return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))


WRONG = [
    ("append", "keys", (halved, doubled, elsewhere)),
    ("append", "values", (halved, doubled, elsewhere)),
    ("gather", "ids", (halved, doubled, elsewhere)),
    ("gather", "into", (halved, doubled, elsewhere, turned)),
    ("minmax", "codes", (halved, doubled, elsewhere, turned)),
    ("minmax", "padding_mask", (halved, elsewhere)),
    ("attend", "padding_mask", (halved,)),
    ("attend_at", "out", (halved, doubled, elsewhere, turned)),
    ("attend_at", "lse", (halved, doubled, elsewhere)),
    ("attend_at", "word", (halved, elsewhere)),
    ("select", "padding_mask", (halved,)),
    ("copy", "sources", (halved, elsewhere)),
    ("copy", "targets", (halved, elsewhere)),
    ("attend_each", "query", (doubled, elsewhere)),
    ("attend_each", "marks", (halved, elsewhere, turned)),
]


@pytest.mark.skipif(not ISAS, reason="no native library")
@pytest.mark.parametrize("way, name, change", [(way, name, one) for way, name, all_of in WRONG for one in all_of])
def test_what_is_not_what_the_library_reads_is_refused(way, name, change):
    native = Native()
    call = getattr(native, way)
    given = {each: native.given[each] for each in call.__code__.co_varnames[1 : call.__code__.co_argcount]}
    call(**given)
    if way == "copy":
        given = {each: torch.zeros(2, dtype=torch.int64) for each in given}
    with pytest.raises(NativeInputError, match="native code got .* it takes .* in host memory"):
        call(**given | {name: change(given[name])})
