"""Pages and tables of pages: reference counts, slabs that never move, copy on write."""

from __future__ import annotations

import gc
import random
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scout_hf.stores import PagePool, PageTable, pages
from tests.unit.naive import QUICK

SHAPE = (2, 2, 4, 3)


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    monkeypatch.setattr(pages, "MIN_SLAB_PAGES", 4)


def new_pool(dtype=torch.float32):
    return PagePool(SHAPE, dtype, "cpu")


def content_of(pool, page):
    slab = max(i for i, start in enumerate(pool.starts) if start <= page)
    return pool.slabs[slab][page - pool.starts[slab]]


def test_a_new_pool_holds_nothing():
    pool = new_pool()
    assert (pool.used_pages, pool.pages, len(pool.slabs)) == (0, 0, 0)
    assert pool.allocate(0).tolist() == [] and pool.used_pages == 0
    pool.release(torch.empty(0, dtype=torch.int64))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2), (torch.float64, 8)])
def test_bytes_of_a_page(dtype, size):
    pool = new_pool(dtype)
    pool.allocate(1)
    assert pool.page_bytes == 48 * size == pool.slabs[0][0].numel() * pool.slabs[0].element_size()


def test_slabs_never_move_and_fresh_pages_are_one_run_in_one_slab():
    pool, places, kept = new_pool(), [], {}
    for count in (3, 1, 2, 9, 30, 5, 100, 1):
        ids = pool.allocate(count)
        assert [slab.data_ptr() for slab in pool.slabs][: len(places)] == places
        places = [slab.data_ptr() for slab in pool.slabs]
        pool.write(ids, ids.float().view(-1, 1, 1, 1, 1).expand(-1, *SHAPE))
        kept.update((page, float(page)) for page in ids.tolist())
    assert len(places) > 3 and len(kept) == 151 == pool.used_pages
    assert all(bool((content_of(pool, page) == value).all()) for page, value in kept.items())
    assert sum(len(slab) for slab in pool.slabs) == pool.pages
    assert list(pool.starts) == [sum(len(s) for s in pool.slabs[:i]) for i in range(len(pool.slabs))]


def test_what_a_slab_has_left_is_not_lost_when_the_next_one_comes():
    pool = new_pool()
    first = pool.allocate(3)  # of 4
    pool.allocate(6)  # does not fit
    assert pool.used_pages == 9
    before = pool.pages
    rest = torch.cat([pool.allocate(1) for _ in range(before - 9)])
    assert pool.pages == before and len({*first.tolist(), *rest.tolist()}) == 3 + before - 9


def test_a_page_comes_back_with_its_last_reference():
    pool = new_pool()
    ids = pool.allocate(3)
    pool.retain(ids[:2])
    pool.retain(ids[[0, 0, 1]])  # twice in one call counts twice
    assert pool.shared(ids).tolist() == [True, True, False]
    pool.release(ids)
    assert pool.used_pages == 2
    pool.release(ids[[0, 0, 1]])
    assert pool.used_pages == 2 and pool.shared(ids).tolist() == [False, False, False]
    pool.release(ids[:2])
    assert pool.used_pages == 0


def test_releasing_one_page_twice_in_a_call_recycles_it_once():
    pool = new_pool()
    ids = pool.allocate(2)
    pool.retain(ids[:1])
    pool.release(torch.stack([ids[0], ids[0], ids[1]]))
    again = pool.allocate(2)
    assert sorted(again.tolist()) == sorted(ids.tolist()) and pool.used_pages == 2


@QUICK
@given(st.integers(0, 10**6))
def test_random_life_of_pages(seed):
    dice, pool, owned = random.Random(seed), new_pool(), {}
    for _ in range(40):
        deed = dice.choice(["take", "take", "share", "give", "give"])
        if deed == "take":
            ids = pool.allocate(dice.randint(1, 6)).tolist()
            assert not set(ids) & set(owned) and len(set(ids)) == len(ids)
            owned.update((page, 1) for page in ids)
        elif owned:
            chosen = dice.choices(sorted(owned), k=dice.randint(1, 3))
            if deed == "share":
                pool.retain(torch.tensor(chosen))
                for page in chosen:
                    owned[page] += 1
            else:
                chosen = sorted(set(chosen))
                pool.release(torch.tensor(chosen))
                owned = {page: n - (page in chosen) for page, n in owned.items() if n > (page in chosen)}
        assert pool.used_pages == len(owned)
        if owned:
            known = torch.tensor(sorted(owned))
            assert pool.shared(known).tolist() == [owned[page] > 1 for page in sorted(owned)]


def test_two_threads_never_get_the_same_page():
    pool, errors, lock, held = new_pool(), [], threading.Lock(), set()

    def work(seed):
        dice = random.Random(seed)
        try:
            for _ in range(300):
                ids = pool.allocate(dice.randint(1, 5))
                with lock:
                    assert not held & set(ids.tolist())
                    held.update(ids.tolist())
                pool.retain(ids)
                pool.release(ids)
                with lock:
                    held.difference_update(ids.tolist())
                pool.release(ids)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors and pool.used_pages == 0


def test_pages_are_copied_across_slabs():
    pool = new_pool()
    ids = torch.cat([pool.allocate(n) for n in (3, 6, 12)])
    pool.write(ids, torch.randn(len(ids), *SHAPE, generator=torch.Generator().manual_seed(0)))
    sources, targets = ids[[0, 20, 5, 10]], ids[[19, 1, 15, 4]]
    pool.copy_pages(sources, targets)
    for source, target in zip(sources.tolist(), targets.tolist()):
        assert torch.equal(content_of(pool, source), content_of(pool, target))


@pytest.mark.parametrize("slabs", [1, 3])
def test_by_slab_covers_every_id_once(slabs):
    pool = new_pool()
    for count in (4, 8, 16)[:slabs]:
        pool.allocate(count)
    for ids in ([0], [1, 2, 3], [3, 1, 2], [2, 2, 0], list(range(pool.pages)), list(range(pool.pages))[::-1], []):
        ids = torch.tensor(ids, dtype=torch.int64)
        seen = torch.full_like(ids, -1)
        for slab, here, local in pool.by_slab(ids):
            start = next(s for s, one in zip(pool.starts, pool.slabs) if one is slab)
            seen[here] = torch.arange(len(slab))[local] + start
        assert torch.equal(seen, ids)


def marked_table(pool, rows, blocks):
    """A table whose pages hold their own number."""
    table = PageTable(pool, rows)
    for page in table.extend(blocks).reshape(-1).tolist():
        content_of(pool, page).fill_(page)
    return table


def test_forks_share_until_one_owns_its_last_page():
    pool = new_pool()
    table = marked_table(pool, 2, 3)
    twin = table.fork()
    assert pool.used_pages == 6 and torch.equal(table.ids, twin.ids)
    before = twin.ids.clone()
    table.own_last()
    assert pool.used_pages == 8
    assert torch.equal(table.ids[:, :2], before[:, :2]) and not bool((table.ids[:, 2] == before[:, 2]).any())
    for mine, old in zip(table.ids[:, 2].tolist(), before[:, 2].tolist()):
        assert torch.equal(content_of(pool, mine), content_of(pool, old))
        content_of(pool, mine).fill_(-1)
    assert bool((content_of(pool, int(before[0, 2])) == before[0, 2]).all())
    twin.own_last()  # nobody else holds them any more: no copy
    assert pool.used_pages == 8 and torch.equal(twin.ids, before)


def test_rows_that_became_the_same_part_ways():
    pool = new_pool()
    table = marked_table(pool, 3, 2)
    kept = table.ids[1].tolist()
    table.select_rows(torch.tensor([1, 1, 1, 1]))
    assert pool.used_pages == 2 and table.ids.tolist() == [kept] * 4
    table.own_last()
    assert len(set(table.ids[:, 1].tolist())) == 4 and set(table.ids[:, 0].tolist()) == {kept[0]}
    table.select_rows(torch.tensor([2]))
    assert pool.used_pages == 2


@pytest.mark.parametrize("after", ["truncate", "fork", "select_rows", "extend then truncate"])
def test_ownership_is_asked_again_after(after):
    pool = new_pool()
    table = marked_table(pool, 2, 3)
    other = table.fork()
    table.own_last()
    if after == "truncate":
        table.truncate(2)
    elif after == "fork":
        other = table.fork()
    elif after == "select_rows":
        table.select_rows(torch.tensor([1, 1]))
    else:
        table.extend(2)
        table.truncate(2)
    table.own_last()
    last = table.ids[:, -1]
    assert not bool(pool.shared(last).any()) and not set(last.tolist()) & set(other.ids.reshape(-1).tolist())


def check_addresses(table):
    """Every page is where the table says: its first byte, in whichever slab."""
    assert table.addresses.shape == table.ids.shape == (table.batch, table.blocks)
    places = [content_of(table.pool, page).data_ptr() for page in table.ids.reshape(-1).tolist()]
    assert table.addresses.reshape(-1).tolist() == places
    assert table.places.dtype == torch.int64 and table.places.stride(2) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@QUICK
@given(st.integers(0, 10**6))
def test_addresses_follow_the_pages(dtype, seed):
    dice, pool = random.Random(seed), new_pool(dtype)
    pool.allocate(dice.randint(0, 5))
    tables = [PageTable(pool, dice.randint(1, 3))]
    for _ in range(25):
        table = dice.choice(tables)
        deed = dice.choice(["extend", "extend", "extend", "rows", "own", "cut", "fork", "drop", "release"])
        if deed == "extend":
            new = table.extend(dice.choice([1, 1, 2, 9]))
            assert torch.equal(table.ids[:, -new.shape[1] :], new)
        elif deed == "rows":
            table.select_rows(torch.tensor([dice.randrange(table.batch) for _ in range(dice.randint(1, 3))]))
        elif deed == "own":
            table.own_last()
        elif deed == "cut":
            table.truncate(dice.randint(0, table.blocks))
        elif deed == "fork":
            tables.append(table.fork())
        elif deed == "drop" and len(tables) > 1:
            tables.remove(table)
            del table
        elif deed == "release":
            table.release()
        for each in tables:
            check_addresses(each)


def test_addresses_point_into_many_slabs():
    pool = new_pool()
    table = PageTable(pool, 2)
    for _ in range(12):
        table.extend(1)
    assert len(pool.slabs) > 2
    check_addresses(table)
    assert pool.addresses(table.ids.contiguous()).tolist() == table.addresses.tolist()
    assert pool.addresses(table.ids[:, :0]).shape == (2, 0)


def test_a_table_that_must_grow_leaves_the_old_one_to_its_readers():
    """A job in flight reads the addresses that it was given."""
    table, seen = PageTable(new_pool(), 2), []
    for _ in range(60):
        before, held = table.places, table.places.clone()
        blocks, capacity = table.blocks, before.shape[2]
        table.extend(1)
        assert (table.places is before) == (capacity > blocks)
        if table.places is not before:
            seen.append(table.places)
        assert torch.equal(before[:, :, :blocks], held[:, :, :blocks])
    assert len({places.data_ptr() for places in seen}) == len(seen) <= 8 and table.blocks == 60
    before = table.places
    table.select_rows(torch.tensor([1, 0]))
    assert table.places is not before and torch.equal(before[:, [1, 0], :60], table.places[:, :, :60])
    twin = table.fork()
    twin.extend(1)
    assert twin.places.data_ptr() != table.places.data_ptr() and table.blocks == 60


def test_tables_give_their_pages_back():
    pool = new_pool()
    tables = [marked_table(pool, 2, 3)]
    tables += [tables[0].fork() for _ in range(3)]
    tables[1].own_last()
    tables[2].truncate(1)
    tables[3].select_rows(torch.tensor([0, 0, 1]))
    tables[0].release()
    assert tables[0].ids.shape == (2, 0)
    tables[0].release()
    assert pool.used_pages > 0
    del tables
    gc.collect()
    assert pool.used_pages == 0
    before = pool.pages
    pool.allocate(before - len(pool.slabs[0]))
    assert pool.pages == before


def test_counting_pages_waits_for_nobody():
    """A signal handler that asks for statistics may run while its own thread holds the lock."""
    pool, found = new_pool(), []
    pool.allocate(3)
    with pool._lock:
        asked = threading.Thread(target=lambda: found.append(pool.used_pages), daemon=True)
        asked.start()
        asked.join(10)
        assert found == [3]
