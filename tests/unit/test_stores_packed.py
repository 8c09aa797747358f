"""Pages of int8: native code and torch write the same bytes, and what is read back is within the rounding."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scout_hf.errors import UnsupportedModelError
from scout_hf.stores import PackedKV, PagedKV, TwoTierKV, make_store, pages
from scout_hf.stores.packed import tile_bytes
from tests.libraries import ISAS, using_isa, without_library
from tests.unit.naive import QUICK, poison

HEADS, DIM, SIZE = 2, 16, 8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=["many slabs", "one slab"])
def slabs(request, monkeypatch):
    monkeypatch.setattr(pages, "MIN_SLAB_PAGES", 3 if request.param == "many slabs" else 4096)
    poison(monkeypatch)


def new_store(batch, dtype=torch.float32, native=True, kind=PackedKV, dim=DIM, size=SIZE):
    if native and ISAS:
        return kind(batch, HEADS, dim, size, dtype, "cpu")
    with without_library():
        return kind(batch, HEADS, dim, size, dtype, "cpu")


def tokens(dice, batch, count, dtype=torch.float32, dim=DIM):
    """Keys with channels of very different sizes, as models have, and values; strided, as they are handed over."""
    generator = torch.Generator().manual_seed(dice.randrange(2**31))
    wide = torch.randn(2, batch, count, HEADS, dim, generator=generator)
    wide[0] *= torch.logspace(-2, 2, dim)
    wide[:, :, :, :, dice.randrange(dim)] *= dice.choice([0, 1, 1])
    return tuple(part.to(dtype).transpose(1, 2) for part in wide)


def tiles(store):
    """Bytes of all packed blocks, (batch, blocks, kv_heads, bytes), without what fills them up to a multiple of 64."""
    found = []
    for page in store.table.ids.reshape(-1).tolist():
        slab = max(i for i, start in enumerate(store.table.pool.starts) if start <= page)
        found.append(store.table.pool.slabs[slab][page - store.table.pool.starts[slab]])
    size, dim = store.block_size, store.head_dim
    used = 2 * size * dim + 2 * (size + dim)
    empty = torch.empty(store.batch, 0, store.heads, used, dtype=torch.uint8)
    return torch.stack(found).view(store.batch, -1, store.heads, tile_bytes(size, dim))[..., :used] if found else empty


def half_a_step(part, along):
    """Half of what lies between two numbers that a block can hold: its largest / 127, as bf16 that rounds up."""
    blocks = part.double().unflatten(2, (-1, SIZE))
    step = blocks.abs().amax(dim=along, keepdim=True) / 127
    return (step * (1 + 2**-7) / 2).expand_as(blocks).flatten(2, 3)


def check_rounding(got, plain, dtype):
    """Whole blocks are within half a step and the rounding of the dtype, the block being filled is as it came."""
    whole = plain[0].shape[2] // SIZE * SIZE
    for have, part, along in zip(got, plain, (3, 4)):
        assert have.dtype == dtype and torch.equal(have[:, :, whole:], part[:, :, whole:])
        have, part = have[:, :, :whole].double(), part[:, :, :whole].double()
        allowed = half_a_step(part, along) * (1 + 1e-5) + have.abs() * torch.finfo(dtype).eps + 1e-7
        assert bool(((have - part).abs() <= allowed).all())


class Trio:
    """A store that packs natively, one that packs with torch, and one that keeps everything as it comes."""

    def __init__(self, batch, dtype):
        self.dtype = dtype
        self.native, self.torch = new_store(batch, dtype), new_store(batch, dtype, native=False)
        self.plain = new_store(batch, dtype, native=False, kind=PagedKV)
        assert self.torch.library is None and (self.native.library is not None) == bool(ISAS)

    @property
    def stores(self):
        return self.native, self.torch, self.plain

    def append(self, *new):
        for store in self.stores:
            store.append(*new)

    def crop(self, length):
        start = length // SIZE * SIZE
        packed, plain = ([*store.read(start, length)] for store in (self.torch, self.plain))
        for store in self.stores:
            store.crop(length)
        left = self.native.read(start, length)
        as_it_came = all(torch.equal(a, b) for a, b in zip(left, plain))
        # A block that is cut is what int8 made of it, unless the append that filled it is taken back.
        assert as_it_came or all(torch.equal(a, b) for a, b in zip(left, packed))
        if not as_it_came:
            self.plain.crop(start)
            self.plain.append(*left)

    def select_rows(self, rows):
        for store in self.stores:
            store.select_rows(rows)

    def fork(self):
        twin = object.__new__(Trio)
        twin.dtype = self.dtype
        twin.native, twin.torch, twin.plain = (store.fork() for store in self.stores)
        return twin

    def check(self, dice):
        length = self.plain.length
        assert {store.length for store in self.stores} == {length}
        assert {store.blocks for store in self.stores} == {-(-length // SIZE)}
        assert torch.equal(tiles(self.native), tiles(self.torch))
        start = dice.randint(0, length)
        stop = dice.randint(start, length)
        for a, b in zip(self.native.read(start, stop), self.torch.read(start, stop)):
            assert torch.equal(a, b)
        plain = self.plain.read(0, length)
        check_rounding(self.native.read(0, length), plain, self.dtype)
        if self.plain.blocks:
            self.check_gather(dice, plain)

    def check_gather(self, dice, plain):
        batch, count, blocks = self.plain.batch, dice.randint(1, 4), self.plain.blocks
        ids = torch.tensor(
            [[[dice.randrange(blocks) for _ in range(count)] for _ in range(HEADS)] for _ in range(batch)]
        )
        filled = ids[..., None] * SIZE + torch.arange(SIZE) < self.plain.length
        got = torch.full((2, 2, batch, HEADS, count, SIZE, DIM), torch.inf, dtype=self.dtype)
        for store, (keys, values) in zip((self.native, self.torch), got):
            store.gather(ids, keys, values)
        assert torch.equal(got[0][:, filled], got[1][:, filled]) and bool(got[0][:, filled].isfinite().all())


def one_operation(trios, dice):
    index = dice.randrange(len(trios))
    deed, trio = dice.choice(["append"] * 4 + ["crop", "rows", "repeat", "fork", "drop"]), trios[index]
    batch = trio.plain.batch
    if deed == "append":
        trio.append(*tokens(dice, batch, dice.choice([1, 1, 2, 3, 5, 7, 8, 9, 27]), trio.dtype))
    elif deed == "crop":
        trio.crop(dice.randint(0, trio.plain.length))
    elif deed == "rows":
        trio.select_rows(torch.tensor([dice.randrange(batch) for _ in range(dice.randint(1, 3))]))
    elif deed == "repeat" and batch < 3:
        trio.select_rows(torch.arange(batch).repeat_interleave(2))
    elif deed == "fork" and len(trios) < 4:
        trios.append(trio.fork())
    elif deed == "drop" and len(trios) > 1:
        del trios[index]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(QUICK, max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_any_sequence_of_operations(dtype, seed):
    dice = random.Random(seed)
    trios = [Trio(dice.randint(1, 2), dtype)]
    pools = [store.table.pool for store in trios[0].stores]
    for _ in range(25):
        one_operation(trios, dice)
        for trio in trios:
            trio.check(dice)
    trio = None
    trios.clear()
    assert [pool.used_pages for pool in pools] == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("native", [True, False])
def test_one_by_one_or_in_bulk_gives_the_same_bytes(dtype, native):
    keys, values = tokens(random.Random(0), 2, 45, dtype)
    found = []
    for pieces in ([45], [1] * 45, [8] * 5 + [5], [3, 5, 29, 8], [40, 5]):
        store, at = new_store(2, dtype, native), 0
        for count in pieces:
            store.append(keys[:, :, at : at + count], values[:, :, at : at + count])
            at += count
        found.append((tiles(store), *store.read(0, 45)))
        assert found[-1][0].shape[1] == 5
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_writes_and_reads_the_same(dtype, isa):
    keys, values = tokens(random.Random(0), 2, 45, dtype)
    native, plain = new_store(2, dtype), new_store(2, dtype, native=False)
    with using_isa(isa):
        for store in (native, plain):
            store.append(keys, values)
        assert torch.equal(tiles(native), tiles(plain))
        assert all(torch.equal(a, b) for a, b in zip(native.read(0, 45), plain.read(0, 45)))


def test_a_block_cut_and_filled_again():
    """Every length to cut at: what stays is what was there, what comes is packed with it."""
    for length in range(0, 25):
        dice, trio = random.Random(length), Trio(2, torch.float32)
        trio.append(*tokens(dice, 2, 24))
        twin, before = trio.fork(), trio.native.read(0, 24)
        trio.crop(length)
        assert all(torch.equal(a, b[:, :, :length]) for a, b in zip(trio.native.read(0, length), before))
        trio.append(*tokens(dice, 2, 11))
        for one in (trio, twin):
            one.check(dice)
        assert all(torch.equal(a, b) for a, b in zip(twin.native.read(0, 24), before))


@pytest.mark.parametrize("native", [True, False])
def test_forks_go_on_for_themselves(native):
    """Also in the block that is being filled, which is no page."""
    dice, store = random.Random(0), new_store(1, native=native)
    store.append(*tokens(dice, 1, 21))
    twin = store.fork()
    before = store.read(0, 21)
    new = [tokens(dice, 1, 9) for _ in range(2)]
    for each, (keys, values) in zip((store, twin), new):
        each.append(keys[:, :, :2], values[:, :, :2])
    for each in (store, twin):  # nothing was packed yet
        assert all(torch.equal(a, b) for a, b in zip(each.read(0, 21), before))
    for each, (keys, values) in zip((store, twin), new):
        each.append(keys[:, :, 2:], values[:, :, 2:])
    for each, (keys, values) in zip((store, twin), new):
        assert all(torch.equal(a, b[:, :, :16]) for a, b in zip(each.read(0, 16), before))
        for got, part in zip(each.read(21, 30), (keys, values)):
            assert (got - part).abs().max() <= 0.01 * part.abs().max() and torch.equal(got[:, :, 3:], part[:, :, 3:])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("forked", [False, True])
def test_an_append_that_is_taken_back_leaves_the_block_as_it_came(native, forked):
    """A pass that fails after it filled a block, or drafts that are not taken, cost no rounding."""
    for before in range(1, 2 * SIZE):
        for more in (1, SIZE - before % SIZE, 2 * SIZE + 3):
            dice, store = random.Random(before), new_store(2, native=native)
            keys, values = tokens(dice, 2, before)
            store.append(keys, values)
            store.append(*tokens(dice, 2, more))
            if forked:
                store, other = store.fork(), store
                other.crop(before)
                other.append(*tokens(dice, 2, 2 * SIZE))
            for length in (before, before // SIZE * SIZE + before % SIZE // 2):
                store.crop(length)
                whole = before // SIZE * SIZE
                for got, part in zip(store.read(whole, length), (keys, values)):
                    assert torch.equal(got, part[:, :, whole:length])


def test_cutting_and_filling_a_block_again_and_again_spoils_little():
    """What drafted tokens do that are not taken: each time costs at most one more rounding."""
    store, rounds = new_store(1), 6
    keys, values = tokens(random.Random(0), 1, 2 * SIZE)
    store.append(keys, values)
    for _ in range(rounds):
        store.crop(2 * SIZE - 1)
        store.append(keys[:, :, -1:], values[:, :, -1:])
    for got, part, along in zip(store.read(0, 2 * SIZE), (keys, values), (3, 4)):
        assert bool(((got - part).abs() <= (rounds + 1) * 1.05 * half_a_step(part, along)).all())
        assert torch.equal(got[:, :, :SIZE], new_store_of(keys, values).read(0, SIZE)[along - 3])


def new_store_of(keys, values):
    store = new_store(len(keys))
    store.append(keys, values)
    return store


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_at_the_ends_of_a_type(native, dtype):
    """Zeros stay zeros, the largest numbers stay finite, signs are kept, and one scale serves a channel of keys."""
    store, info = new_store(1, dtype, native), torch.finfo(dtype)
    keys = torch.zeros(1, HEADS, SIZE, DIM, dtype=dtype)
    keys[..., 1], keys[..., 2] = info.max / 2, -info.max / 2
    keys[:, :, ::2, 3], keys[:, :, 1::2, 3] = 100, -0.01
    keys[:, :, 2, 4] = 1e-3
    store.append(keys, keys)
    got = store.read(0, SIZE)
    assert not got[0][..., 0].any() and not got[0][..., 5:].any() and not got[1][..., 5:].any()
    for part in got:
        assert bool(part.isfinite().all())
        assert bool((part[..., 1] > 0).all()) and bool((part[..., 2] < 0).all())
    assert (got[0][..., 1] / keys[..., 1] - 1).abs().max() < 1e-2
    assert (got[0][:, :, ::2, 3] - 100).abs().max() < 0.5 and got[0][:, :, 1::2, 3].abs().max() < 0.5
    assert (got[0][:, :, 2, 4] - 1e-3).abs().max() < 1e-5


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, -torch.inf])
def test_garbage_stays_garbage(native, rubbish):
    """It must not turn into numbers, and spoils no other channel of keys and no other token of values."""
    store, keys = new_store(1, native=native), tokens(random.Random(0), 1, SIZE)[0].contiguous()
    spoiled = keys.clone()
    spoiled[0, 1, 3, 5] = rubbish
    store.append(spoiled, spoiled)
    got_keys, got_values = store.read(0, SIZE)
    assert not got_keys[0, 1, 3, 5].isfinite() and not got_values[0, 1, 3, 5].isfinite()
    channels, places = torch.arange(DIM) != 5, torch.arange(SIZE) != 3
    assert bool(got_keys[0, 1][:, channels].isfinite().all()) and bool(got_keys[0, 0].isfinite().all())
    assert bool(got_values[0, 1][places].isfinite().all()) and bool(got_values[0, 0].isfinite().all())


def test_bytes_of_both_kinds():
    plain, packed = (new_store(1, torch.bfloat16, kind=kind, dim=128, size=32) for kind in (PagedKV, PackedKV))
    for store in (plain, packed):
        store.append(*tokens(random.Random(0), 1, 320, torch.bfloat16, dim=128))
    tail = 2 * HEADS * 32 * 128 * 2
    assert packed.used_bytes - tail == 10 * HEADS * tile_bytes(32, 128) < 0.55 * plain.used_bytes
    assert tile_bytes(32, 128) % 64 == 0 and tile_bytes(32, 128) == 2 * 32 * 128 + 2 * (32 + 128)


def test_sizes_that_the_native_code_does_not_know():
    """float64, and heads that are no multiple of 8: with torch, and as exactly as before."""
    for dtype, dim in ((torch.float64, 16), (torch.float32, 20), (torch.float32, 6)):
        store = new_store(1, dtype, dim=dim)
        assert store.library is None
        keys, values = tokens(random.Random(0), 1, 20, dtype, dim)
        store.append(keys, values)
        check_rounding(store.read(0, 20), (keys, values), torch.float32 if dtype == torch.float32 else dtype)
    with pytest.raises(UnsupportedModelError, match="even head_dim.*head_dim=7; use host_dtype=None"):
        new_store(1, dim=7)


def test_which_store_a_host_dtype_makes():
    sizes = (1, HEADS, DIM, SIZE, torch.float32, "cpu")
    assert type(make_store(*sizes)) is PagedKV is type(make_store(*sizes, None))
    assert type(make_store(*sizes, "int8")) is PackedKV is type(TwoTierKV(*sizes, "int8").host)


def test_two_tiers_pack_what_is_written_back():
    """The tail stays as it came; a block that comes back from the host is what int8 made of it."""
    store = TwoTierKV(2, HEADS, DIM, SIZE, torch.float32, "cpu", "int8")
    keys, values = tokens(random.Random(0), 2, 45)
    for at in range(45):
        store.append(keys[:, :, at : at + 1], values[:, :, at : at + 1])
        store.write_back(1)
    host = store.host.length
    assert host == 32 and not store.host.length % SIZE
    got = store.read(0, 45)
    check_rounding([part[:, :, :host] for part in got], (keys[:, :, :host], values[:, :, :host]), torch.float32)
    assert torch.equal(got[0][:, :, host:], keys[:, :, host:]) and torch.equal(got[1][:, :, host:], values[:, :, host:])
    store.crop(29)
    assert store.length == 29 and store.host.length == 24
    assert all(torch.equal(a, b[:, :, :29]) for a, b in zip(store.read(0, 29), got))
