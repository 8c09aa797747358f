"""Resident slots against plain sets: load, adopt, recall, crop, rows, forks; slots hold what their number says."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scout_hf.kernels.cpu import make_backend
from scout_hf.stores import PackedKV, PagedKV, ResidentSlots, pages
from scout_hf.stores.resident_slots import EMPTY
from tests.libraries import ISAS, without_library
from tests.unit.naive import QUICK, poison

BATCH, HEADS, SIZE, DIM = 2, 2, 4, 8


@pytest.fixture(autouse=True)
def poisoned_small_slabs(monkeypatch):
    monkeypatch.setattr(pages, "MIN_SLAB_PAGES", 5)
    poison(monkeypatch)


@pytest.fixture(scope="module")
def pool():
    """What copies natively, in the background."""
    backend = make_backend("native")
    yield backend
    backend.close()


def host_of(blocks, batch=BATCH, seed=0, dtype=torch.float32, kind=PagedKV):
    store = kind(batch, HEADS, DIM, SIZE, dtype, "cpu")
    grow(store, blocks, seed)
    return store


def grow(store, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn(2, store.batch, HEADS, blocks * SIZE, DIM, generator=generator).to(store.dtype)
    store.append(new[0], new[1])
    return new


def new_slots(slots, batch=BATCH, dtype=torch.float32):
    return ResidentSlots(batch, HEADS, slots, SIZE, DIM, dtype, "cpu")


def sets(resident):
    """The resident blocks of every row and head; fails where one is there twice."""
    found = []
    for row in resident.ids.flatten(0, 1).tolist():
        real = [block for block in row if block != EMPTY]
        assert len(set(real)) == len(real)
        found.append(set(real))
    return found


def check(resident, host):
    """Slots in use come first, name existing blocks and hold them; a gap is known as one."""
    assert bool((resident.ids[:, :, resident.filled :] == EMPTY).all())
    assert resident.gaps or not bool((resident.ids[:, :, : resident.filled] == EMPTY).any())
    keys, values = resident.content()
    assert keys.shape == values.shape == (resident.ids.shape[0], HEADS, resident.filled * SIZE, DIM)
    ids = resident.ids[:, :, : resident.filled]
    stored = [part.unflatten(2, (-1, SIZE)) for part in host.read(0, host.blocks * SIZE)]
    for held, whole in zip((keys.unflatten(2, (-1, SIZE)) if resident.filled else keys, values), stored):
        if resident.filled:
            where = ids.clamp(min=0)[..., None, None].expand(*ids.shape, SIZE, DIM)
            real = ids != EMPTY
            assert torch.equal(held.reshape(whole.shape[0], HEADS, -1, SIZE, DIM)[real], whole.gather(2, where)[real])
    everything = torch.arange(host.blocks).expand(resident.ids.shape[0], HEADS, -1)
    marks = resident.holds(everything, host.blocks).flatten(0, 1).tolist()
    assert [{i for i, yes in enumerate(row) if yes} for row in marks] == sets(resident)


def wish(dice, batch, blocks, padded=False):
    """Distinct blocks per row and head, best first; with padding, some at the end do not count."""
    count = dice.randint(1, blocks)
    ids = torch.tensor([[dice.sample(range(blocks), count) for _ in range(HEADS)] for _ in range(batch)])
    valid = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        for row in range(batch):
            valid[row, :, dice.randint(0, count) :] = False
    return ids, valid


def wanted_of(ids, valid):
    rows = zip(ids.flatten(0, 1).tolist(), valid.flatten(0, 1).tolist())
    return [[block for block, counts in zip(*row) if counts] for row in rows]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("slots", [1, 3, 5, 9])
def test_loading_takes_the_best_that_fit(slots, padded):
    dice, host = random.Random(slots), host_of(8)
    for _ in range(10):
        resident = new_slots(slots)
        ids, valid = wish(dice, BATCH, 8, padded)
        came = resident.load(ids, valid, host)
        check(resident, host)
        expected = [set(row) for row in wanted_of(ids[:, :, :slots], valid[:, :, :slots])]
        assert sets(resident) == expected and came == sum(map(len, expected))
        assert resident.gaps == (not bool(valid[:, :, :slots].all()))


def test_loading_again_forgets_what_was_there():
    host, resident = host_of(8), new_slots(4)
    for ids in ([0, 1, 2, 3], [7], [5, 6]):
        ids = torch.tensor(ids).expand(BATCH, HEADS, -1)
        resident.load(ids, torch.ones_like(ids, dtype=torch.bool), host)
        check(resident, host)
        assert sets(resident) == [set(ids[0, 0].tolist())] * 4 and not resident.gaps


def recalled(before, wanted, slots):
    """What must be resident after a recall, in part: every wish that was there, then the best missing ones that fit."""
    missing = [block for block in wanted if block not in before]
    kept = before & set(wanted)
    capacity = slots - len(kept)
    return kept, missing[:capacity]


def in_a_thread(plan, host):
    worker = threading.Thread(target=plan.run, args=(host,))
    worker.start()
    worker.join()


def by(backend):
    """A way to carry out a plan: as copies by the native pool."""

    def copy(plan, host):
        sources, targets, size = plan.addresses(host)
        assert len(sources) == len(targets) == 2 * plan.blocks and 2 * plan.blocks * size == plan.moved_bytes
        backend.copy(sources, targets, size, keep=(plan, host)).wait()

    return copy


@pytest.mark.skipif(not ISAS, reason="no native library")
@QUICK
@given(seed=st.integers(0, 10**6), padded=st.booleans())
def test_random_life_of_slots_with_native_copies(pool, seed, padded):
    random_life(seed, padded, by(pool))


@QUICK
@given(st.integers(0, 10**6), st.booleans())
def test_random_life_of_slots(seed, padded):
    random_life(seed, padded, in_a_thread)


def random_life(seed, padded, carry_out):
    dice = random.Random(seed)
    host, resident = host_of(dice.randint(1, 6)), new_slots(dice.randint(1, 6))
    others = []
    for step in range(12):
        deed = dice.choice(["load", "recall", "recall", "recall", "adopt", "crop", "rows", "fork"])
        batch, blocks = host.batch, host.blocks
        if deed == "load" or not step:
            resident.load(*wish(dice, batch, blocks, padded), host)
        elif deed == "recall":
            check_recall(resident, host, *wish(dice, batch, blocks, padded), carry_out)
        elif deed == "adopt" and blocks < 12:
            before = sets(resident)
            resident.adopt(blocks, *grow(host, 1, seed + step))
            assert sets(resident) == [row | {blocks} if len(row) < resident.slots else row for row in before]
        elif deed == "crop" and blocks > 1:
            left, before = dice.randint(1, blocks - 1), sets(resident)
            host.crop(left * SIZE)
            resident.crop(left)
            assert sets(resident) == [{block for block in row if block < left} for row in before]
        elif deed == "rows":
            rows = torch.tensor([dice.randrange(batch) for _ in range(dice.randint(1, 3))])
            host.select_rows(rows)
            resident.select_rows(rows)
        elif deed == "fork":
            others.append((resident, host))
            resident, host = resident.fork(), host.fork()
        check(resident, host)
    for one in others:
        check(*one)


def check_recall(resident, host, ids, valid, carry_out=in_a_thread):
    before, wanted = sets(resident), wanted_of(ids, valid)
    plan = resident.plan_recall(ids, valid, host.blocks)
    expected = [recalled(had, want, resident.slots) for had, want in zip(before, wanted)]
    came = sum(len(new) for _, new in expected)
    assert (plan is None) == (came == 0)
    if plan is not None:
        assert plan.blocks == came
        assert plan.moved_bytes == came * 2 * SIZE * DIM * resident.keys.element_size()
        carry_out(plan, host)
    for had, (kept, new), now in zip(before, expected, sets(resident)):
        assert kept | set(new) <= now <= had | set(new)
        assert len(now) >= max(len(had), len(kept) + len(new))


def test_a_recall_of_nothing_new_is_none():
    host, resident = host_of(6), new_slots(4)
    ids = torch.tensor([3, 0, 5]).expand(BATCH, HEADS, -1)
    valid = torch.ones_like(ids, dtype=torch.bool)
    resident.load(ids, valid, host)
    assert resident.plan_recall(ids.flip(2), valid, 6) is None
    assert resident.plan_recall(torch.full_like(ids, 4), torch.zeros_like(valid), 6) is None
    check(resident, host)


def test_a_recall_writes_only_after_it_is_run():
    host, resident = host_of(6), new_slots(2)
    first = torch.tensor([0, 1]).expand(BATCH, HEADS, -1)
    resident.load(first, torch.ones_like(first, dtype=torch.bool), host)
    before = resident.keys.clone()
    plan = resident.plan_recall(first + 3, torch.ones_like(first, dtype=torch.bool), 6)
    assert torch.equal(resident.keys, before) and sets(resident) == [{3, 4}] * 4
    plan.run(host)
    check(resident, host)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_copies_of_every_dtype(dtype):
    if not ISAS:
        pytest.skip("no native library")
    backend = make_backend("native")
    host, resident = host_of(9, dtype=dtype), new_slots(3, dtype=dtype)
    ids = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(n))[:3] for n in range(BATCH * HEADS)])
    ids = ids.view(BATCH, HEADS, 3)
    resident.load((ids + 4) % 9, torch.ones_like(ids, dtype=torch.bool), host)
    check_recall(resident, host, ids, torch.ones_like(ids, dtype=torch.bool), by(backend))
    check(resident, host)
    backend.close()


def test_what_cannot_be_copied_as_it_lies():
    """int8 must be unpacked, another dtype converted, and without the library there are no addresses."""
    with without_library():
        unknown = host_of(6)
        assert make_backend().copy(*torch.zeros(2, 1, dtype=torch.int64), 0, None) is None
    wanted = torch.tensor([3, 4]).expand(BATCH, HEADS, -1)
    valid = torch.ones_like(wanted, dtype=torch.bool)
    for host, dtype in (
        (host_of(6, kind=PackedKV), torch.float32),
        (host_of(6), torch.bfloat16),
        (unknown, torch.float32),
    ):
        plan = new_slots(2, dtype=dtype).plan_recall(wanted, valid, 6)
        assert plan.blocks == 8 and plan.addresses(host) is None


def test_forks_are_independent():
    host, resident = host_of(6), new_slots(3)
    ids = torch.tensor([0, 1, 2]).expand(BATCH, HEADS, -1)
    valid = torch.ones_like(ids, dtype=torch.bool)
    resident.load(ids, valid, host)
    twin = resident.fork()
    check_recall(resident, host, ids + 3, valid)
    assert sets(twin) == [{0, 1, 2}] * 4
    check(twin, host)
    check(resident, host)
    twin.crop(1)
    assert twin.gaps and not resident.gaps and sets(resident) == [{3, 4, 5}] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_its_bytes(dtype):
    host, resident = host_of(5, dtype=dtype), new_slots(3, dtype=dtype)
    ids = torch.tensor([4, 1]).expand(BATCH, HEADS, -1)
    resident.load(ids, torch.ones_like(ids, dtype=torch.bool), host)
    check(resident, host)
    assert resident.used_bytes == 2 * BATCH * HEADS * 3 * SIZE * DIM * 2 and resident.slots == 3


def test_holds_nothing_at_the_start():
    resident = new_slots(3)
    assert resident.filled == 0 and resident.content()[0].shape == (BATCH, HEADS, 0, DIM)
    assert not bool(resident.holds(torch.arange(4).expand(BATCH, HEADS, -1), 4).any())
