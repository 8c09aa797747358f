"""ScoutCache against DynamicCache: the same random operations, the same logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import DynamicCache

import scout_hf
from tests.unit.naive import poison
from tests.unit.worlds import (
    HEAD_DIM,
    KV_HEADS,
    SETTINGS,
    TOLERANCE,
    TWO_TIERS,
    VOCAB,
    World,
    forward,
    new_cache,
    stock_model,
)


def check_digests(method, mask):
    """The code of every digested block without padding is that of the keys that the store has now."""
    if not hasattr(method, "selector"):
        return
    blocks, size = method.selector.blocks, method.config.block_size
    assert blocks <= method.length // size
    if blocks:
        keys = method.kv.read(0, blocks * size)[0].unflatten(2, (blocks, size))
        padding_mask = mask[:, : blocks * size].view(-1, blocks, size)
        if method.config.digest == "minmax":
            expected = torch.cat([keys.amax(3), keys.amin(3)], -1)
        else:
            expected = method.selector.digest.encode(keys, padding_mask)
        differs = (method.selector.table.codes() != expected).any(-1).any(1)
        assert not bool((differs & padding_mask.all(2)).any())


def check_residents(method):
    """Every slot that names a block holds that block."""
    resident = getattr(method, "resident", None)
    if resident is not None:
        size, host = method.config.block_size, method.kv.host
        for row, head, slot in (resident.ids >= 0).nonzero().tolist():
            block = int(resident.ids[row, head, slot])
            assert slot < resident.filled and block < host.blocks
            for held, stored in zip((resident.keys, resident.values), host.read(block * size, block * size + size)):
                assert torch.equal(held[row, head, slot], stored[row, head])


class Operations(RuleBasedStateMachine):
    """Forward, crop, reorder, repeat, select, deepcopy and reset, in any order, on one or more caches."""

    name, dtype = "one tier", torch.float32

    @initialize(batch=st.integers(1, 3), padding=st.lists(st.integers(0, 12), min_size=3, max_size=3))
    def start(self, batch, padding):
        self.worlds = [World(self.name, batch, padding[:batch], self.dtype)]
        self.which = 0

    @property
    def world(self):
        return self.worlds[self.which % len(self.worlds)]

    def chance(self):
        return self.world.mask.shape[1]

    @rule(tokens=st.integers(1, 20), seed=st.integers(0, 999), mask_given=st.booleans())
    def forward(self, tokens, seed, mask_given):
        self.world.check(tokens, seed, mask_given)

    @precondition(lambda self: self.chance())
    @rule(steps=st.integers(1, 6), seed=st.integers(0, 999))
    def decode(self, steps, seed):
        for step in range(steps):
            self.world.check(1, seed + step, True)

    @rule(tokens=st.integers(1, 20), seed=st.integers(0, 999))
    def update_outside(self, tokens, seed):
        self.world.fill(tokens, seed)

    @precondition(lambda self: self.chance())
    @rule(share=st.floats(0, 1), by_length=st.booleans())
    def crop(self, share, by_length):
        self.world.crop(max(1, int(share * self.world.mask.shape[1])), by_length)

    @precondition(lambda self: self.chance())
    @rule(data=st.data())
    def reorder(self, data):
        batch = len(self.world.mask)
        rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch)))
        self.world.stock.reorder_cache(rows)
        self.world.scout.reorder_cache(rows)
        self.world.mask = self.world.mask[rows]

    @precondition(lambda self: self.chance() and len(self.world.mask) <= 3)
    @rule(repeats=st.integers(1, 2))
    def repeat(self, repeats):
        self.world.stock.batch_repeat_interleave(repeats)
        self.world.scout.batch_repeat_interleave(repeats)
        self.world.mask = self.world.mask.repeat_interleave(repeats, 0)

    @precondition(lambda self: self.chance())
    @rule(data=st.data(), as_bool=st.booleans())
    def select(self, data, as_bool):
        batch = len(self.world.mask)
        if as_bool:
            rows = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch).filter(any)))
        else:
            rows = torch.tensor(data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=batch)))
        self.world.stock.batch_select_indices(rows)
        self.world.scout.batch_select_indices(rows)
        self.world.mask = self.world.mask[rows]

    @precondition(lambda self: len(self.worlds) < 3)
    @rule(keep_both=st.booleans())
    def deepcopy(self, keep_both):
        twin = self.world.twin()
        if keep_both:
            self.worlds.append(twin)
        else:
            self.worlds[self.which % len(self.worlds)] = twin

    @rule(which=st.integers(0, 2))
    def turn_to(self, which):
        self.which = which

    @rule(batch=st.integers(1, 3), padding=st.lists(st.integers(0, 12), min_size=3, max_size=3))
    def reset(self, batch, padding):
        # DynamicCache.reset keeps its length in older versions of transformers: a new one takes its place.
        scout = self.world.scout
        scout.reset()
        assert scout.get_seq_length() == 0
        fresh = World(self.name, batch, padding[:batch], self.dtype)
        fresh.scout = scout
        self.worlds[self.which % len(self.worlds)] = fresh

    @invariant()
    def lengths_agree(self):
        for world in getattr(self, "worlds", []):
            assert world.scout.get_seq_length() == world.stock.get_seq_length() == world.mask.shape[1]

    @invariant()
    def digests_and_residents_belong_to_their_blocks(self):
        for world in getattr(self, "worlds", []):
            world.scout.drain()
            for layer in world.scout.scout_layers:
                if layer.method is not None:
                    check_digests(layer.method, world.mask)
                    check_residents(layer.method)

    def teardown(self):
        for world in getattr(self, "worlds", []):
            world.fill(1, 5)  # the rest of the cache comes back with it
            world.check(2, 3, True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_any_sequence_of_operations(name, dtype, monkeypatch):
    poison(monkeypatch)
    machine = type("Machine", (Operations,), {"name": name, "dtype": dtype})
    quick = settings(
        max_examples=12,
        stateful_step_count=20,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # shrinking takes minutes: add Phase.shrink by hand when something fails
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=quick)


def a_page_in_use(layer):
    """One page of the layer's store that holds a whole block of row 0."""
    host = getattr(layer.method.kv, "host", layer.method.kv)
    page = int(host.table.ids[0, 1])
    pool = host.table.pool
    slab = max(i for i, start in enumerate(pool.starts) if start <= page)
    return pool.slabs[slab][page - pool.starts[slab]]


@pytest.mark.parametrize("name", ["one tier", "two tiers"])
@pytest.mark.parametrize("part", [0, 1], ids=["keys", "values"])
def test_one_percent_in_one_page_is_seen(name, part):
    world = World(name, 2)
    world.check(60, 0, True)
    a_page_in_use(world.scout.layers[0])[:, part] *= 1.01
    assert world.run(5, 1, True) > 1e-4


def test_deepcopies_part_ways_and_the_pages_come_back():
    world = World("one tier", 2)
    world.run(37, 0, True)
    pool = world.scout.layers[0].method.kv.table.pool
    before = pool.used_pages
    twins = [world.twin() for _ in range(3)]
    assert pool.used_pages == before
    for seed, twin in enumerate(twins):
        twin.check(9, seed, True)
    world.check(9, 77, True)
    assert pool.used_pages > before
    del twins, twin
    assert pool.used_pages == 2 * 6
    world.scout.reset()
    assert pool.used_pages == 0


@pytest.mark.parametrize("budget", [1.0, 48])
def test_budget_of_the_whole_context_is_exact_after_a_crop(budget, monkeypatch):
    monkeypatch.setitem(SETTINGS, "cut", {**TWO_TIERS, "window": 16, "budget": budget, "layer_ahead": False})
    world = World("cut", 2, [0, 5])
    world.check(64, 0, True)
    world.crop(24)
    for seed in range(4):
        world.check(1, seed, True)


def test_crop_reads_positive_as_length_and_the_rest_as_an_amount():
    world = World("two tiers", 1)
    world.fill(50, 0)
    for amount, left in ((0, 50), (-3, 47), (40, 40), (60, 40), (-100, 0)):
        world.scout.crop(amount)
        assert world.scout.get_seq_length() == left


@pytest.mark.parametrize("host_dtype", (None, "int8"))
@pytest.mark.parametrize("name", ("one tier", "two tiers"))
def test_crop_takes_a_tensor_of_one_number(name, host_dtype):
    """Prompt lookup of transformers 5.17 hands one over."""
    cache = new_cache(name, host_dtype=host_dtype)
    ids = torch.zeros(1, 50, dtype=torch.long)
    forward(stock_model(), cache, ids, torch.ones_like(ids, dtype=torch.bool))
    for amount, left in ((-3, 47), (40, 40)):
        cache.crop(torch.tensor(amount))
        assert cache.get_seq_length() == left and type(cache.get_seq_length()) is int


@pytest.mark.parametrize("rows", [(2, 0), [1, -1], [True, False, True], torch.tensor([False, True, True])], ids=str)
@pytest.mark.parametrize("name", ("one tier", "two tiers"))
def test_rows_are_chosen_by_whatever_dynamic_cache_takes(name, rows):
    ids = torch.arange(3 * 40).view(3, 40) % VOCAB
    stock, scout = DynamicCache(config=stock_model().config), new_cache(name)
    for cache in (stock, scout):
        forward(stock_model(), cache, ids, torch.ones_like(ids, dtype=torch.bool))
        cache.batch_select_indices(rows)
    for kept, expected in zip(scout.layers, stock.layers):
        assert torch.equal(kept.keys, expected.keys) and torch.equal(kept.values, expected.values)


def test_an_unpatched_model_is_right_with_a_scout_cache():
    for name in ("one tier", "two tiers"):
        world = World(name, 2, [0, 3])
        ids = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(0))
        mask = torch.ones(2, 30, dtype=torch.bool)
        mask[1, :3] = False
        for step in (slice(0, 21), slice(21, 22), slice(22, 30)):
            expected = forward(stock_model(), world.stock, ids[:, step], mask[:, : step.stop])
            got = forward(stock_model(), world.scout, ids[:, step], mask[:, : step.stop])
            real = mask[:, step]
            assert (got - expected)[real].abs().max() <= TOLERANCE[torch.float32]


def test_another_batch_size_is_refused_with_a_way_out():
    cache = new_cache("one tier")
    cache.update(torch.zeros(2, KV_HEADS, 4, HEAD_DIM), torch.zeros(2, KV_HEADS, 4, HEAD_DIM), 0)
    with pytest.raises(scout_hf.CacheStateError, match="2 rows.* 3 new ones.*batch_repeat_interleave"):
        cache.update(torch.zeros(3, KV_HEADS, 1, HEAD_DIM), torch.zeros(3, KV_HEADS, 1, HEAD_DIM), 0)


@pytest.mark.parametrize("widths", [(24, 8), (8, 24)], ids=str)
def test_keys_and_values_of_different_widths(widths):
    cache, stock = new_cache("one tier"), DynamicCache()
    for tokens in (9, 1, 12):
        new = [torch.randn(2, KV_HEADS, tokens, width) for width in widths]
        for got, expected in zip(cache.update(*new, 0), stock.update(*new, 0), strict=True):
            assert torch.equal(got, expected)
    layer = cache.fork().to_dynamic().layers[0]
    assert torch.equal(layer.keys, stock.layers[0].keys) and torch.equal(layer.values, stock.layers[0].values)
    with pytest.raises(scout_hf.CacheStateError, match="filled by another model"):
        cache.update(new[1], new[0], 0)
    with pytest.raises(scout_hf.CacheStateError, match="as many rows"):
        cache.update(new[0], new[1][:, :, 1:], 0)
