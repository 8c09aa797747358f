"""Digests of a store's keys made in parts and from samples: the same as all at once, and whole if something fails."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scout_hf import ScoutConfig
from scout_hf.selection import Selector, SignCode, make_digest, reading
from scout_hf.stores import PackedKV, PagedKV
from tests.libraries import ISAS
from tests.unit.naive import QUICK, poison
from tests.unit.selecting import BATCH, HEADS, KEYS, PADDING, SIZE, make_mask, make_store

CODES = ("sign", "sign2", "minmax-int8", "minmax-sub")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(reading, "PART_TOKENS", 3 * SIZE)
    monkeypatch.setattr(reading, "SAMPLE_TOKENS", 4 * SIZE)
    poison(monkeypatch)


def new_selector(name):
    return Selector(ScoutConfig(digest=name, block_size=SIZE), 0, KEYS)


def whole_keys(store, blocks, mask):
    keys = store.read(0, blocks * SIZE)[0].unflatten(2, (-1, SIZE))
    return keys, None if mask is None else mask[:, : blocks * SIZE].unflatten(1, (-1, SIZE))


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("kind", [PagedKV, PackedKV])
@QUICK
@given(seed=st.integers(0, 10**6), padding=st.sampled_from(PADDING), native=st.booleans())
def test_parts_are_the_whole(name, kind, seed, padding, native):
    """With whatever constants there are; after a crop too."""
    dice = random.Random(seed)
    native = native and bool(ISAS)
    store = make_store(dice.randint(SIZE, 160), seed, kind=kind, native=native)
    blocks, mask = store.length // SIZE, make_mask(padding, store.length + dice.randint(0, 9), seed)
    selector = new_selector(name)
    for last in sorted(dice.randint(0, blocks) for _ in range(dice.randint(0, 3))):
        selector.extend_from(store, last, mask)
    selector.extend_from(store, blocks, mask)
    for _ in range(2):
        expected = selector.digest.encode(*whole_keys(store, blocks, mask))
        assert selector.blocks == blocks and torch.equal(selector.table.codes(), expected)
        selector.crop(dice.randint(0, blocks - 1))
        selector.extend_from(store, blocks, mask)


@pytest.mark.parametrize("blocks", [1, 4, 5, 20])
def test_a_short_row_beside_a_long_one_is_coded_as_if_alone(blocks):
    """Its constants come from its own tokens, however few of the batch's blocks are sampled."""
    store = make_store(20 * SIZE, 1)
    padding = (20 - blocks) * SIZE + 3
    mask = torch.ones(BATCH, 20 * SIZE, dtype=torch.bool)
    mask[1, :padding] = False
    together = new_selector("sign")
    together.extend_from(store, 20, mask)
    alone, keys = PagedKV(1, HEADS, KEYS.shape[3], SIZE, torch.float32, "cpu"), store.read(0, 20 * SIZE)[0]
    own = keys[1:2, :, (20 - blocks) * SIZE :]
    alone.append(own, own)
    expected = new_selector("sign")
    expected.extend_from(alone, blocks, mask[1:2, (20 - blocks) * SIZE :])
    assert torch.equal(together.table.codes()[1:2, :, 20 - blocks :], expected.table.codes())
    assert not torch.equal(together.digest.mean[0], together.digest.mean[1])


def test_a_sample_lies_all_over_a_long_context():
    store = make_store(40 * SIZE, 2)
    keys, padding_mask = reading.read_sample(store, 40, None)
    assert padding_mask is None and keys.shape[2] == 4
    whole = whole_keys(store, 40, None)[0]
    assert all(torch.equal(keys[:, :, place], whole[:, :, block]) for place, block in enumerate((0, 13, 26, 39)))
    mask = torch.ones(BATCH, 40 * SIZE, dtype=torch.bool)
    mask[0] = False
    mask[2, : 38 * SIZE + 1] = False
    keys, padding_mask = reading.read_sample(store, 40, mask)
    assert padding_mask.sum((1, 2)).tolist() == [0, 4 * SIZE, 2 * SIZE - 1]
    assert torch.equal(keys[2, :, :2], whole[2, :, 38:]) and keys.shape[2] == 4
    keys, padding_mask = reading.read_sample(store, 40, torch.zeros_like(mask))
    assert keys.shape[2] == 1 and not padding_mask.any()


class Planted(Exception):
    pass


def fail_once(monkeypatch, name, method, when):
    """The when-th call of a digest's method raises."""
    kind, left = type(make_digest(name)), [when]
    original = getattr(kind, method)

    def failing(self, *args):
        left[0] -= 1
        if not left[0]:
            raise Planted
        return original(self, *args)

    monkeypatch.setattr(kind, method, failing)


@pytest.mark.parametrize("from_store", [False, True])
@pytest.mark.parametrize(("method", "when"), [("fit", 1), ("encode", 1), ("encode", 2), ("encode", 4)])
@pytest.mark.parametrize(("start", "due"), [(2, True), (4, False)])
def test_what_fails_can_be_done_again(monkeypatch, from_store, method, when, start, due):
    """Whether constants are due again or not: neither constants nor codes are half new."""
    store = make_store(20 * SIZE, 3)
    keys = store.read(0, 20 * SIZE)[0]

    def extend(selector, first, last):
        if from_store:
            return selector.extend_from(store, last, None)
        past = lambda: (keys[:, :, : first * SIZE], None)  # noqa: E731
        return selector.extend(keys[:, :, first * SIZE : last * SIZE], None, past)

    expected, selector = new_selector("sign"), new_selector("sign")
    for one in (expected, selector):
        extend(one, 0, start)
    before, digest = selector.table.codes().clone(), selector.digest
    extend(expected, start, 20)
    with monkeypatch.context() as patched:
        fail_once(patched, "sign", method, when)
        try:
            extend(selector, start, 20)
        except Planted:
            assert torch.equal(selector.table.codes(), before) and selector.digest is digest
            extend(selector, start, 20)
    assert torch.equal(selector.table.codes(), expected.table.codes())
    assert (expected.digest.mean != digest.mean).any() == due


@pytest.mark.parametrize("name", [*CODES, "minmax"])
@pytest.mark.parametrize("native", [False, True])
def test_a_default_device_is_not_asked(name, native):
    """A model on the CPU in a program whose new tensors go elsewhere."""
    store = make_store(12 * SIZE, 4, native=native and bool(ISAS))
    expected, selector = new_selector(name), new_selector(name)
    expected.extend_from(store, 12, None)
    mask = torch.ones(BATCH, 12 * SIZE, dtype=torch.bool)
    try:
        torch.set_default_device("meta")
        selector.extend_from(store, 12, mask)
        SignCode().fit(*reading.read_sample(store, 12, None), None, 1.0)
    finally:
        torch.set_default_device(None)
    assert torch.equal(selector.table.codes(), expected.table.codes())
