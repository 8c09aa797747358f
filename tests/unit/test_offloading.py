"""The parts of the methods beside scout: splits, staging memory, transfers, partial keys, the emulated link."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import scout_hf
from scout_hf import ScoutCache
from scout_hf.errors import ConfigError
from scout_hf.kernels.cpu import make_backend
from scout_hf.kernels.cpu.workers import Workers
from scout_hf.kernels.weigh import attend_weighing, mean_weights
from scout_hf.methods.base import find_method
from scout_hf.methods.host_to_device import blocks_to_device, tokens_to_device
from scout_hf.selection.partial import PartialKeys
from scout_hf.split import Rates, best_split, layer_seconds
from scout_hf.stores import PagedKV
from scout_hf.stores.emulated_link import EmulatedLink
from scout_hf.stores.retained_tokens import RetainedTokens
from scout_hf.stores.staging import Staging
from scout_hf.stores.streams import Links
from scout_hf.stores.token_cache import TokenCache
from tests.unit.naive import QUICK, attention, poison
from tests.unit.worlds import World, stock_model

CPU = torch.device("cpu")


# -- how much to recompute ---------------------------------------------------------------------------------------


@QUICK
@given(*(st.floats(1e-9, 1e-3) for _ in range(3)), st.floats(0, 0.1), st.integers(1, 400), st.integers(0, 400))
def test_no_split_is_better_than_the_best(input_s, kv_s, compute_s, other_s, tokens, most):
    rates = Rates(input_s, kv_s, compute_s, other_s)
    chosen = best_split(rates, tokens, min(most, tokens))
    assert 0 <= chosen <= min(most, tokens)
    by_all = min(layer_seconds(rates, tokens, split) for split in range(min(most, tokens) + 1))
    # Whole tokens: off by one token's cost at most.
    assert layer_seconds(rates, tokens, chosen) <= by_all + kv_s + compute_s + input_s


@pytest.mark.parametrize("group", [2, 4, 8])
def test_nothing_is_recomputed_where_inputs_are_no_smaller(group):
    """h * p bytes against 2 * h * p / g."""
    assert best_split(Rates(1.0, 2.0 / group, 1e-9), 1000, 1000) == 0


def test_the_paper_s_example():
    """h 4096, fp16, 100 TFLOP/s, 25 GB/s: half of the tokens where a layer waits for its inputs, two thirds ahead."""
    hidden, item, link, gemm = 4096, 2, 25e9, 100e12
    rates = Rates(hidden * item / link, 2 * hidden * item / link, 4 * hidden**2 / gemm)
    assert best_split(rates, 10000, 10000) / 10000 == pytest.approx(0.656, abs=0.001)
    assert rates.kv_s / (rates.kv_s + rates.compute_s) == pytest.approx(0.49, abs=0.01)


# -- staging memory and transfers -----------------------------------------------------------------------------------


@QUICK
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300)), max_size=40))
def test_staging_never_hands_out_the_same_memory_twice(operations):
    staging, out = Staging(), []
    for take, size in operations:
        if take or not out:
            taken = staging.take((size, 3), torch.float32, CPU)
            taken.fill_(len(out))
            out.append((taken, len(out)))
        else:
            staging.give_back(out.pop(size % len(out))[0])
        assert all(bool((tensor == number).all()) for tensor, number in out) or len({n for _, n in out}) < len(out)
        ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor, _ in out)
        assert all(before[1] <= after[0] for before, after in zip(ranges, ranges[1:]))
        assert staging.used_bytes >= sum(tensor.nbytes for tensor, _ in out)


def test_staging_is_used_again():
    staging = Staging()
    first = staging.take((100,), torch.float32, CPU)
    place, held = first.data_ptr(), staging.used_bytes
    staging.give_back(first)
    assert staging.take((104,), torch.float32, CPU).data_ptr() == place and staging.used_bytes == held
    assert copy.deepcopy(staging).used_bytes == 0


class FakeStep:
    def __init__(self, backend="auto"):
        self.cache, self.links, self.movers = self, Links(), Workers()
        self.staging, self.backend = Staging(), make_backend(backend)


def a_store(dtype=torch.float32, tokens=80, dim=16, slabs=1):
    generator = torch.Generator().manual_seed(0)
    store, parts = PagedKV(2, 3, dim, 8, dtype, CPU), []
    for _ in range(slabs):
        parts.append([torch.randn(2, 3, tokens, dim, generator=generator).to(dtype) for _ in range(2)])
        store.append(*parts[-1])
    return store, *(torch.cat(each, 2) for each in zip(*parts))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("slabs", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_and_tokens_come_as_they_are(backend, slabs, dtype, monkeypatch):
    poison(monkeypatch)
    store, keys, values = a_store(dtype, slabs=slabs)
    assert slabs == 1 or len(store.table.pool.slabs) > 1
    step = FakeStep(backend)
    coming = blocks_to_device(step, store, 2, 7, slice(1, 3), CPU)
    for got, expected in zip(coming.wait(), (keys, values)):
        assert torch.equal(got, expected[:, 1:3, 16:56])
    coming.give_back()
    ids = torch.randint(0, keys.shape[2], (2, 3, 21), generator=torch.Generator().manual_seed(1))
    coming = tokens_to_device(step, store, ids, CPU)
    for got, expected in zip(coming.wait(), (keys, values)):
        assert torch.equal(got, expected.gather(2, ids.unsqueeze(-1).expand(-1, -1, -1, 16)))
    assert coming.nbytes == 2 * 2 * 3 * 21 * 16 * dtype.itemsize
    coming.drain()
    coming.give_back()


def test_a_transfer_without_a_library(monkeypatch):
    store, keys, _ = a_store()
    store.library = None
    ids = torch.tensor([[[3, 79], [0, 8], [7, 15]]] * 2)
    got = tokens_to_device(FakeStep(), store, ids, CPU).wait()[0]
    assert torch.equal(got, keys.gather(2, ids.unsqueeze(-1).expand(-1, -1, -1, 16)))


class Done:
    def wait(self):
        return "result"

    def drain(self):
        return True

    def done(self):
        return True


def test_an_emulated_link_is_busy_with_one_transfer_at_a_time(emulated):
    link = EmulatedLink()
    assert link.limit(done := Done(), 10**9, None) is done
    tickets = [link.limit(Done(), 2_000_000, 0.1) for _ in range(3)]
    assert not tickets[0].done()
    assert tickets[2].wait() == "result"
    assert emulated.now == pytest.approx(0.06)
    assert all(ticket.done() for ticket in tickets)
    assert [round((ticket.due - tickets[0].begin) * 1e3) for ticket in tickets] == [20, 40, 60]


def test_a_link_that_was_idle_gives_no_credit(emulated):
    link = EmulatedLink()
    link.limit(Done(), 1000, 1.0).wait()
    emulated.sleep(0.02)
    ticket = link.limit(Done(), 1_000_000, 0.1)
    assert ticket.due - emulated.now == pytest.approx(0.01)


# -- choosing single tokens -----------------------------------------------------------------------------------------


def test_all_channels_make_exact_scores():
    generator = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(2, heads, 30, 16, generator=generator).double() for heads in (6, 3))
    partial = PartialKeys(1.0)
    partial.learn(query.reshape(2, 3, -1, 16))
    partial.extend(keys[:, :, :11])
    partial.extend(keys[:, :, 11:])
    got = partial.scores(query[:, :, :1])
    expected = torch.einsum("bhgd,bhtd->bhgt", query[:, :, 0].reshape(2, 3, 2, 16), keys)
    assert (got - expected).abs().max() <= 1e-12
    twin = partial.fork()
    partial.crop(5)
    partial.extend(torch.zeros_like(keys[:, :, :2]))
    assert (twin.scores(query[:, :, :1]) - expected).abs().max() <= 1e-12
    twin.select_rows(torch.tensor([1, 1]))
    assert torch.equal(twin.scores(query[[1, 1], :, :1])[0], twin.scores(query[[1, 1], :, :1])[1])


def test_partial_keys_outlive_the_growth_of_their_buffer():
    generator = torch.Generator().manual_seed(0)
    query, keys = (torch.randn(1, 2, tokens, 16, generator=generator).double() for tokens in (30, 700))
    partial = PartialKeys(1.0)
    partial.learn(query)
    for part in keys.split([10, 290, 1, 399], dim=2):
        partial.extend(part)
    assert (partial.scores(query[:, :, :1]) - query[:, :, :1] @ keys.transpose(2, 3)).abs().max() <= 1e-12


def test_tokens_that_did_not_come_are_asked_for_again():
    ids = torch.arange(12).reshape(1, 2, 6)
    tokens, valid = TokenCache(1, 2, 4, torch.float32, CPU), torch.ones(1, 2, 6, dtype=torch.bool)
    tokens.plan(ids[:, :, :4], valid[:, :, :4], 12)
    tokens.put(*torch.ones(2, 8, 4))
    for _ in range(2):
        asked, real = tokens.plan(ids[:, :, 2:], valid[:, :, 2:], 12)
        assert [row[here].tolist() for row, here in zip(asked[0], real[0])] == [[4, 5], [10, 11]]
        tokens.forget()


def test_a_fork_of_kept_tokens_has_slots_of_its_own():
    ids, valid = torch.tensor([[[0, 1]]]), torch.ones(1, 1, 2, dtype=torch.bool)
    tokens = TokenCache(1, 1, 4, torch.float32, CPU)
    tokens.plan(ids, valid, 4)
    tokens.put(*torch.ones(2, 2, 4))
    twin = tokens.fork()
    twin.plan(ids + 2, valid, 4)
    twin.put(*torch.full((2, 2, 4), 7.0))
    assert tokens.plan(ids, valid, 4) is None
    keys, values, chosen = tokens.content()
    assert torch.equal(keys[chosen], torch.ones(2, 4)) and torch.equal(values[chosen], keys[chosen])


def test_few_channels_serve_queries_of_few_directions():
    """Queries in 16 dimensions of 64: as many directions tell all; the same number of channels would not."""
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(16, 64, generator=generator).double()
    query = (torch.randn(1, 1, 50, 16, generator=generator).double() @ plane).contiguous()
    keys = torch.randn(1, 1, 200, 64, generator=generator).double()
    partial = PartialKeys(0.1)
    partial.learn(query)
    partial.extend(keys)
    assert (partial.scores(query[:, :, :1])[0, 0, 0] - keys[0, 0] @ query[0, 0, 0]).abs().max() <= 1e-10


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_weights_are_those_of_a_naive_softmax(softcap):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 8, generator=generator)
    keys, values = (torch.randn(2, 3, 17, 8, generator=generator) for _ in range(2))
    allowed = torch.rand(2, 1, 1, 17, generator=generator) > 0.3
    allowed[1] = False
    partial, weights = attend_weighing(query[:, :, :1], keys, values, 0.5, softcap, allowed)
    out, lse = attention(query[:, :, :1], keys, values, 0.5, softcap, allowed)
    assert (partial.out - out).abs().max() <= 1e-6
    assert torch.equal(partial.lse == -torch.inf, lse == -torch.inf) and not weights[1].any()
    eye = torch.eye(17).expand(2, 3, -1, -1)
    single, _ = attention(query[:, :, :1], keys, eye, 0.5, softcap, allowed)
    assert (weights - single[:, :, 0].reshape(2, 3, 2, 17).amax(2)).abs().max() <= 1e-6
    real = torch.tensor([[True, False, True, True, True], [False] * 5])
    means = mean_weights(query, keys, 0.5, softcap, allowed, real, causal=True)
    order = torch.arange(17)[None] <= (12 + torch.arange(5))[:, None]
    each, _ = attention(query, keys, eye, 0.5, softcap, allowed & order)
    expected = (each * real[:, None, :, None]).sum(2) / real.sum(-1).clamp(min=1)[:, None, None]
    assert (means - expected.reshape(2, 3, 2, 17).amax(2)).abs().max() <= 1e-6


def test_mean_weights_in_pieces_are_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(2, 6, 50, 8, generator=generator), torch.randn(2, 3, 70, 8, generator=generator)
    whole = mean_weights(query, keys, 0.5, causal=True)
    monkeypatch.setattr("scout_hf.kernels.weigh.MOST_SCORES", 2 * 6 * 70 * 7)
    assert (mean_weights(query, keys, 0.5, causal=True) - whole).abs().max() <= 1e-6


@QUICK
@given(st.data())
def test_kept_tokens_are_a_set_per_head(data):
    """Any sequence of add, limit, crop, select_rows and fork, against dicts."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    kept, naive, first = RetainedTokens(2, 2, 8, 8, torch.float32), [[{}, {}], [{}, {}]], 0
    for _ in range(data.draw(st.integers(1, 8))):
        what = data.draw(st.sampled_from(["add", "add", "limit", "crop", "select", "fork"]))
        if what == "add":
            count = data.draw(st.integers(1, 20))
            keys, values = (torch.randn(2, 2, count, 8, generator=generator) for _ in range(2))
            weights = torch.rand(2, 2, count, generator=generator)
            valid = torch.rand(2, 2, count, generator=generator) > 0.6
            kept.add(keys, values, torch.arange(first, first + count), weights, valid)
            for row in range(2):
                for head in range(2):
                    for n in valid[row, head].nonzero().flatten().tolist():
                        naive[row][head][first + n] = (float(weights[row, head, n]), keys[row, head, n])
            first += count
        elif what == "limit":
            most = data.draw(st.integers(1, 15))
            kept.limit(torch.tensor([most, most + 2]))
            for row in range(2):
                for head in range(2):
                    ranked = sorted(naive[row][head].items(), key=lambda item: -item[1][0])
                    naive[row][head] = dict(ranked[: most + 2 * row])
        elif what == "crop":
            first = data.draw(st.integers(0, first))
            kept.crop(first)
            naive = [[{t: held for t, held in head.items() if t < first} for head in row] for row in naive]
        elif what == "select":
            rows = data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=2))
            kept.select_rows(torch.tensor(rows))
            naive = [[dict(head) for head in naive[row]] for row in rows]
        else:
            kept = kept.fork()
        keys = kept.kv.read(0, kept.kv.length)[0]
        assert kept.valid.shape[1] == kept.kv.length and kept.total == int(kept.valid.sum())
        for row in range(2):
            for head in range(2):
                at = row * 2 + head
                held = {int(kept.tokens[at, n]): keys[at, 0, n] for n in kept.valid[at].nonzero().flatten()}
                assert held.keys() == naive[row][head].keys()
                assert all(torch.equal(held[token], naive[row][head][token][1]) for token in held)


# -- the methods ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dense", "kvpr", "infinigen", "hgca"])
@pytest.mark.parametrize("wrong", [{"split": "off"}, {"host_dtype": "int8"}, {"monitor": True},
                         {"method_options": {"no_such": 1}}, {"method_options": 3}, {"link_gbps": 0},
                         {"link_gbps": True}, {"digest": "no such"}, {"recall": 1}, {"cpu_query": "real"},
                         {"hand_over": "join"}], ids=str)  # fmt: skip
def test_what_a_method_cannot_do_is_refused_at_once(method, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).split("_")[0]):
        ScoutCache(stock_model().config, method=method, **wrong)


def test_digests_are_of_methods_that_draft_or_decode_sparsely_by_them():
    for method in ("infinigen", "hgca"):
        with pytest.raises(ConfigError, match="it belongs to 'scout'"):
            ScoutCache(stock_model().config, method=method, digest="sign")
    for method in ("dense", "kvpr"):
        ScoutCache(stock_model().config, method=method, digest="sign")


@pytest.mark.parametrize(
    "method, wrong",
    [
        ("dense", {"heads": 0}),
        ("dense", {"heads": True}),
        ("kvpr", {"share": 2.0}),
        ("kvpr", {"inputs": "disk"}),
        ("infinigen", {"alpha": 0}),
        ("infinigen", {"ratio": 1.5}),
        ("infinigen", {"keep": 1}),
        ("hgca", {"alpha": float("nan")}),
        ("hgca", {"threshold": float("nan")}),
        ("scout", {"alpha": 1.0}),
    ],
    ids=str,
)
def test_a_method_s_own_options_are_checked(method, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ScoutCache(stock_model().config, method=method, method_options=wrong)


def test_methods_say_whether_they_are_exact():
    def exact(method, **options):
        config = scout_hf.ScoutConfig(method=method, **options)
        return find_method(method).is_exact(config, CPU)

    assert exact("dense") and exact("kvpr") and exact("dense", budget=64)
    assert not exact("infinigen") and exact("infinigen", budget=None) and exact("infinigen", budget=1.0)
    assert not exact("hgca", budget=None) and not exact("hgca", method_options={"threshold": 0})
    assert exact("hgca", budget=None, method_options={"threshold": 0})
    assert not exact("scout", split="cpu", budget=None) and exact("scout", budget=None)


@pytest.mark.parametrize("name", ["dense", "dense, head by head", "kvpr"])
def test_what_was_begun_before_a_further_turn_is_begun_again(name):
    """The first layer's copy starts in the step before; then a turn of many tokens comes, whose blocks it lacks."""
    world = World(name, 1)
    for seed, tokens in enumerate((50, 1, 1, 21, 1, 1)):
        world.check(tokens, seed, True)


def test_kvpr_cuts_positions_with_their_tokens():
    world = World("kvpr", 1)
    world.check(40, 0, True)
    world.crop(20)
    world.check(100, 1, True)
    world.check(1, 2, True)


def test_kvpr_moves_positions_with_their_rows():
    world, swapped = World("kvpr", 2, [0, 9]), torch.tensor([1, 0])
    world.check(60, 0, True)
    for cache in (world.stock, world.scout):
        cache.batch_select_indices(swapped)
    world.mask = world.mask[swapped]
    world.check(1, 1, True)


@pytest.mark.parametrize("budget, most", [(40, 40), (0.5, 60)])
def test_infinigen_attends_to_what_its_budget_allows(budget, most, monkeypatch):
    from tests.unit.worlds import SETTINGS

    options = {"alpha": None}
    chosen = {"method": "infinigen", "window": 8, "method_options": options, "budget": budget}
    monkeypatch.setitem(SETTINGS, "some", chosen)
    world = World("some", 2, [0, 30])
    world.run(120, 0, True)
    world.run(1, 1, True)
    method = world.scout.layers[0].method
    counts = method._most(FakeMask(world.mask), method_exists(world)) + 8
    assert counts[0] == most and counts[1] == (40 if budget == 40 else 45)


class FakeMask:
    def __init__(self, mask):
        self.mask, self.tokens = mask, mask.shape[1]

    def padding(self, device):
        return self.mask


def method_exists(world):
    return world.mask[:, None, None]


def test_hgca_keeps_what_its_threshold_says_and_reads_nothing_else():
    """Tokens that were dropped may be overwritten with NaN: nobody reads them."""
    from tests.unit.worlds import SETTINGS

    SETTINGS["sparse hgca"] = {"method": "hgca", "resident": 16, "budget": None, "method_options": {"threshold": 2.0}}
    try:
        world = World("sparse hgca", 2)
        world.run(100, 0, True)
        for layer in world.scout.layers:
            kept = layer.method.kept
            assert 0 < kept.total < 2 * 2 * layer.method.kv.host.length * 0.9
            for pool in layer.method.pools():
                for slab in pool.slabs:
                    slab.fill_(torch.nan)
        assert world.run(1, 1, True) < 10
    finally:
        del SETTINGS["sparse hgca"]
