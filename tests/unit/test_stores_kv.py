"""Paged KV, on one and two tiers, against plain tensors: any sequence of operations, freed pages full of NaN."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scout_hf.stores import PackedKV, PagedKV, TwoTierKV, pages
from tests.libraries import ISAS, without_library
from tests.unit.naive import QUICK, poison

HEADS, DIM, SIZE = 2, 8, 4


@pytest.fixture(autouse=True, params=["many slabs", "one slab"])
def slabs(request, monkeypatch):
    monkeypatch.setattr(pages, "MIN_SLAB_PAGES", 3 if request.param == "many slabs" else 4096)
    poison(monkeypatch)


@pytest.fixture(autouse=True, params=["native", "torch"][not ISAS :])
def copies(request):
    """Whether the native library or torch moves tokens into pages and out of them."""
    with without_library() if request.param == "torch" else nullcontext():
        yield request.param


def tokens(dice, batch, count, dtype=torch.float32):
    generator = torch.Generator().manual_seed(dice.randrange(2**31))
    wide = torch.randn(2, batch, count, HEADS, DIM, generator=generator).to(dtype)
    return wide[0].transpose(1, 2), wide[1].transpose(1, 2)  # strided, as models hand them over


class Pair:
    """A store and the plain tensors that it should hold."""

    def __init__(self, store, keys, values):
        self.store, self.plain = store, (keys, values)

    def append(self, keys, values):
        self.store.append(keys, values)
        self.plain = tuple(torch.cat([old, new], 2) for old, new in zip(self.plain, (keys, values)))

    def crop(self, length):
        self.store.crop(length)
        self.plain = tuple(part[:, :, :length] for part in self.plain)

    def select_rows(self, rows):
        self.store.select_rows(rows)
        self.plain = tuple(part[rows] for part in self.plain)

    def fork(self):
        return Pair(self.store.fork(), *self.plain)

    @property
    def length(self):
        return self.plain[0].shape[2]

    def check(self, start, stop):
        for got, expected in zip(self.store.read(start, stop), self.plain):
            assert torch.equal(got, expected[:, :, start:stop])


def new_pair(kind, batch, dtype=torch.float32):
    store = kind(batch, HEADS, DIM, SIZE, dtype, torch.device("cpu"))
    empty = torch.empty(batch, HEADS, 0, DIM, dtype=dtype)
    return Pair(store, empty, empty)


def check_gather(host, plain, dice):
    """Random blocks per row and head; the unfilled end of a last block is left out."""
    batch, count = host.batch, dice.randint(1, 5)
    ids = torch.tensor(
        [[[dice.randrange(host.blocks) for _ in range(count)] for _ in range(HEADS)] for _ in range(batch)]
    )
    got = torch.full((2, batch, HEADS, count, SIZE, DIM), torch.inf, dtype=plain[0].dtype)
    host.gather(ids, got[0], got[1])
    padded = [torch.nn.functional.pad(part[:, :, : host.length], (0, 0, 0, -host.length % SIZE)) for part in plain]
    unfilled = (ids == host.blocks - 1)[..., None] & (torch.arange(SIZE) >= (host.length - 1) % SIZE + 1)
    where = ids[..., None, None].expand(*ids.shape, SIZE, DIM)
    for have, part in zip(got, padded):
        expected = part.unflatten(2, (-1, SIZE)).gather(2, where)
        assert torch.equal(have[~unfilled], expected[~unfilled])


def one_operation(pairs, dice, two_tiers):
    index = dice.randrange(len(pairs))
    deeds = ["append"] * 4 + ["crop", "rows", "repeat", "fork", "drop"] + ["write back"] * 3 * two_tiers
    pair, deed = pairs[index], dice.choice(deeds)
    batch = pair.plain[0].shape[0]
    if deed == "append":
        pair.append(*tokens(dice, batch, dice.choice([1, 1, 2, 3, 4, 5, 8, 13]), pair.plain[0].dtype))
    elif deed == "crop":
        pair.crop(dice.randint(0, pair.length))
    elif deed == "rows":
        pair.select_rows(torch.tensor([dice.randrange(batch) for _ in range(dice.randint(1, 4))]))
    elif deed == "repeat" and batch < 4:
        pair.select_rows(torch.arange(batch).repeat_interleave(2))
    elif deed == "fork" and len(pairs) < 4:
        pairs.append(pair.fork())
    elif deed == "drop" and len(pairs) > 1:
        del pairs[index]
    elif deed == "write back":
        check_write_back(pair, dice.randint(0, 3))


def check_write_back(pair, window):
    store = pair.store
    host, tail = store.host.length, store.length - store.host.length
    moved = max(0, tail // SIZE - window) * SIZE
    blocks = store.full_blocks(window)
    assert (blocks is None) == (moved == 0)
    for got, expected in zip(blocks or (), pair.plain):
        assert torch.equal(got, expected[:, :, host : host + moved])
    store.write_back(window)
    assert store.host.length == host + moved and store.length == pair.length
    assert store.full_blocks(window) is None


@pytest.mark.parametrize("kind", [PagedKV, TwoTierKV])
@QUICK
@given(seed=st.integers(0, 10**6))
def test_any_sequence_of_operations(kind, seed):
    dice = random.Random(seed)
    pairs = [new_pair(kind, dice.randint(1, 3))]
    pool = getattr(pairs[0].store, "host", pairs[0].store).table.pool
    for _ in range(40):
        one_operation(pairs, dice, kind is TwoTierKV)
        for pair in pairs:
            assert pair.store.length == pair.length and pair.store.batch == pair.plain[0].shape[0]
            start = dice.randint(0, pair.length)
            pair.check(start, dice.randint(start, pair.length))
            host = getattr(pair.store, "host", pair.store)
            assert host.blocks == -(-host.length // SIZE)
            if host.blocks:
                check_gather(host, pair.plain, dice)
    for pair in pairs:
        pair.check(0, pair.length)
    host = pair = None
    pairs.clear()
    assert pool.used_pages == 0


@pytest.mark.parametrize("kind", [PagedKV, TwoTierKV])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_kept(kind, dtype, copies):
    host = new_pair(kind, 2, dtype).store
    host = getattr(host, "host", host)
    assert (host.library is not None) == (copies == "native" and dtype != torch.float64)
    dice, pair = random.Random(0), new_pair(kind, 2, dtype)
    for count in (5, 1, 1, 9):
        pair.append(*tokens(dice, 2, count, dtype))
    pair.check(0, 16)
    assert pair.store.read(0, 16)[0].dtype == dtype


@pytest.mark.parametrize("kind", [PagedKV, PackedKV])
@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ((2, HEADS, 5, DIM + 1), (2, HEADS, 5, DIM + 1)),
        ((2, HEADS, 5, DIM - 1), (2, HEADS, 5, DIM - 1)),
        ((2, HEADS + 1, 5, DIM), (2, HEADS + 1, 5, DIM)),
        ((3, HEADS, 5, DIM), (3, HEADS, 5, DIM)),
        ((2, HEADS, 5, DIM), (2, HEADS, 4, DIM)),
    ],
    ids=str,
)
def test_wrong_sizes_are_refused(kind, keys, values):
    store = kind(2, HEADS, DIM, SIZE, torch.float32, "cpu")
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        store.append(torch.zeros(keys), torch.zeros(values))
    assert store.length == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tokens_of_another_dtype_are_converted_or_refused(dtype):
    store = PagedKV(1, HEADS, DIM, SIZE, torch.float32, "cpu")
    keys = torch.randn(1, HEADS, 5, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    try:
        store.append(keys, keys)
    except (RuntimeError, TypeError, ValueError):
        return
    assert torch.equal(store.read(0, 5)[0], keys.float())


def test_tokens_that_learn_leave_no_graph():
    store = PagedKV(1, HEADS, DIM, SIZE, torch.float32, "cpu")
    keys = torch.randn(1, HEADS, 5, DIM, requires_grad=True)
    with torch.no_grad():
        store.append(keys, keys * 2)
    got = store.read(0, 5)
    assert torch.equal(got[0], keys) and not got[0].requires_grad


def test_strides_of_every_kind():
    """Broadcast rows, transposed and skipping dimensions, and channels that are not contiguous."""
    wide = torch.randn(2, HEADS, 2 * DIM, 12, generator=torch.Generator().manual_seed(0))
    parts = [wide[:, :, :DIM].transpose(2, 3), wide[:1, :, ::2].transpose(2, 3).expand(2, -1, -1, -1)]
    store = PagedKV(2, HEADS, DIM, SIZE, torch.float32, "cpu")
    store.append(parts[0][:, :, ::2], parts[1][:, :, ::2])
    store.append(parts[0].flip(1)[:, :, 1::2], parts[1][:, :, 1::2])
    for got, part in zip(store.read(0, 12), (torch.cat([parts[0][:, :, ::2], parts[0].flip(1)[:, :, 1::2]], 2),
                                             torch.cat([parts[1][:, :, ::2], parts[1][:, :, 1::2]], 2))):  # fmt: skip
        assert torch.equal(got, part)


@pytest.mark.parametrize("kind", [PagedKV, TwoTierKV])
def test_what_was_read_does_not_change_later(kind):
    dice, pair = random.Random(0), new_pair(kind, 1)
    pair.append(*tokens(dice, 1, 10))
    if kind is TwoTierKV:
        pair.store.write_back(0)
    before = [part.clone() for part in pair.plain]
    held = pair.store.read(0, 8)
    pair.crop(0)
    pair.append(*tokens(dice, 1, 10))
    assert all(torch.equal(a, b[:, :, :8]) for a, b in zip(held, before))


def test_a_fork_costs_no_page_until_it_writes():
    dice, pair = random.Random(0), new_pair(PagedKV, 2)
    pair.append(*tokens(dice, 2, 4 * SIZE + 1))
    used = pair.store.used_bytes
    twins = [pair.fork() for _ in range(5)]
    assert pair.store.used_bytes == used == 2 * 5 * pair.store.table.pool.page_bytes
    for twin in twins:
        twin.append(*tokens(dice, 2, 1))
    assert pair.store.used_bytes == used + 5 * 2 * pair.store.table.pool.page_bytes
    for one in (pair, *twins):
        one.check(0, one.length)


def test_write_back_is_append_only_and_moves_each_block_once():
    dice, pair = random.Random(0), new_pair(TwoTierKV, 1)
    host, written = pair.store.host, []
    append = host.append
    host.append = lambda keys, values: (written.append(keys.shape[2]), append(keys, values))
    for _ in range(50):
        pair.append(*tokens(dice, 1, 1))
        pair.store.write_back(2)
        assert pair.store.length - host.length < 3 * SIZE
    assert sum(written) == host.length == 50 // SIZE * SIZE - 2 * SIZE and set(written) == {SIZE}
    pair.check(0, 50)


def test_a_crop_into_the_host_leaves_whole_blocks_there():
    for length in range(0, 41):
        dice, pair = random.Random(0), new_pair(TwoTierKV, 2)
        pair.append(*tokens(dice, 2, 40))
        pair.store.write_back(1)
        twin = pair.fork()
        pair.crop(length)
        assert pair.store.host.length == min(length // SIZE * SIZE, 36) and pair.store.length == length
        pair.append(*tokens(dice, 2, 7))
        for one in (pair, twin):
            one.check(0, one.length)


def test_tail_is_a_view_that_grows_in_place():
    dice, pair = random.Random(0), new_pair(TwoTierKV, 1)
    pair.append(*tokens(dice, 1, 1))
    place = pair.store.tail()[0].data_ptr()
    for _ in range(SIZE - 1):
        pair.append(*tokens(dice, 1, 1))
        assert pair.store.tail()[0].data_ptr() == place
    assert torch.equal(pair.store.tail()[1], pair.plain[1])
    assert pair.store.device_bytes == 2 * HEADS * SIZE * DIM * 4
