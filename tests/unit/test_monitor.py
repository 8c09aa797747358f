"""The monitor: whose turn it is, partials of single blocks, held pages, sums, and jobs that fail or come late."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from scout_hf.counters import Counters
from scout_hf.fusion import Partial
from scout_hf.kernels.cpu import BlockLists, make_backend
from scout_hf.kernels.cpu.each_block import attend_each, attend_each_native, natively
from scout_hf.kernels.cpu.pool import NativePool
from scout_hf.loss import NAMES, lost
from scout_hf.monitor import MOST_PENDING, SPARSE_EVERY, Monitor, planned
from scout_hf.selection import Pick
from scout_hf.stats import summarise
from scout_hf.stores import make_store
from scout_hf.stores.snapshot import WholeBlocks
from tests.libraries import ISAS
from tests.unit import naive

pytestmark = pytest.mark.usefixtures("monitored_at_once")

NATIVE = pytest.mark.skipif(not ISAS, reason="no native library")
SIZE = 8


# -- whose turn it is ------------------------------------------------------------------------------------------


def cache_of(monitor, *kv_heads):
    """Layers with so many KV heads; None for one that has no method yet."""
    methods = [SimpleNamespace(layer_idx=index, kv_heads=heads) for index, heads in enumerate(kv_heads) if heads]
    return SimpleNamespace(scout_config=SimpleNamespace(monitor=monitor), methods=methods)


def taken(cache, first, last):
    """(layer, head) pairs of the steps, in their order."""
    turns = [planned(cache, step) for step in range(first, last + 1)]
    return [[(layer, head) for layer, heads in turn.items() for head in heads] for turn in turns]


def test_true_looks_at_one_pair_in_every_eighth_step_and_at_all_in_turn():
    turns = taken(cache_of(True, 2, 2, 2), 1, 6 * SPARSE_EVERY)
    assert [len(turn) for turn in turns] == [1, *[0] * (SPARSE_EVERY - 1)] * 6
    pairs = sum(turns, [])
    assert sorted(pairs) == [(layer, head) for layer in range(3) for head in range(2)]
    assert sorted(layer for layer, _ in pairs[:3]) == [0, 1, 2], "all layers come by before the second head of one"


def test_a_few_looks_lie_all_over_the_model():
    pairs = sum(taken(cache_of(True, *[8] * 32), 1, 32 * SPARSE_EVERY), [])
    assert {layer for layer, _ in pairs} == set(range(32)) and len({head for _, head in pairs}) == 8
    for few in (pairs[:6], pairs[20:26]):
        assert len({layer // 8 for layer, _ in few}) == 4 and len({head for _, head in few}) >= 4


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.77, 0.999])
def test_a_share_is_kept_and_visits_all_pairs_equally_often(share):
    cache = cache_of(share, 4, 2, None, 4)
    pairs = sum(taken(cache, 1, 300), [])
    assert abs(len(pairs) - 300 * share * 10) <= 1
    visits = [pairs.count(pair) for pair in {(i, h) for i, n in ((0, 4), (1, 2), (3, 4)) for h in range(n)}]
    assert max(visits) - min(visits) <= 1 and sum(visits) == len(pairs)


def test_everything_in_every_step_and_nothing_without_a_monitor():
    assert planned(cache_of(1.0, 2, 1), 5) == {0: (0, 1), 1: (0,)}
    assert taken(cache_of(1.0, 3, 3), 1, 4) == [[(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]] * 4
    assert planned(cache_of(False, 2, 2), 1) == planned(cache_of(True), 1) == planned(cache_of(1.0, None), 1) == {}


# -- partials of single blocks, and the pages they are made from -------------------------------------------------


def filled(tokens=61, heads=3, dim=16, rows=2, dtype=torch.float32, host_dtype=None, seed=0, pieces=1):
    """A store, and its keys and values as they came."""
    generator = torch.Generator().manual_seed(seed)
    store = make_store(rows, heads, dim, SIZE, dtype, "cpu", host_dtype)
    given = [torch.randn((rows, heads, tokens, dim), generator=generator).to(dtype) for _ in range(2)]
    for some in zip(*(part.chunk(pieces, dim=2) for part in given)):
        store.append(*some)
    return store, given


WAYS = {
    "torch": lambda *args: attend_each(*args),
    "native": lambda *args: attend_each_native(*args, pool=None),
    "pool": lambda *args: attend_each_native(*args, pool=POOL[0]),
}
POOL: list[NativePool] = []


@pytest.fixture(params=[pytest.param(way, marks=NATIVE if way != "torch" else ()) for way in WAYS])
def each(request):
    if request.param == "pool":
        store, _ = filled()
        POOL.append(NativePool(store.library.handle, background=True))
    yield WAYS[request.param]
    while POOL:
        POOL.pop().close()


CASES = {
    "plain": {},
    "one query head": {"group": 1},
    "a large group": {"group": 20},
    "softcap": {"softcap": 1.5},
    "padding": {"padded": True},
    "bf16": {"dtype": torch.bfloat16, "tolerance": 2e-2},
    "fp16": {"dtype": torch.float16, "tolerance": 2e-3},
    "int8": {"host_dtype": "int8", "tolerance": 2e-2},
    "int8, padding": {"host_dtype": "int8", "padded": True, "tolerance": 2e-2},
    "several slabs": {"pieces": 4, "tokens": 70 * SIZE, "rows": 3},
    "no whole block": {"tokens": 5},
}


@pytest.mark.parametrize("case", CASES)
def test_every_block_by_itself(each, case):
    case = {"group": 4, "tolerance": 1e-5} | CASES[case]
    group, softcap, tolerance = case.pop("group"), case.pop("softcap", None), case.pop("tolerance")
    padded = case.pop("padded", False)
    store, _ = filled(**case)
    assert case.get("pieces", 1) == 1 or len(store.table.pool.slabs) > 1
    blocks = WholeBlocks(store)
    query = torch.randn((group, store.head_dim), generator=torch.Generator().manual_seed(1)).to(store.dtype)
    padding_mask = None
    if padded:
        padding_mask = torch.rand((blocks.blocks, SIZE), generator=torch.Generator().manual_seed(2)) < 0.6
        padding_mask[0] = False
    keys, values = store.read(0, blocks.tokens)
    for row, head in ((0, 1), (store.batch - 1, 2)):
        got = each(query, blocks, row, head, 0.4, softcap, padding_mask)
        assert got.out.shape == (blocks.blocks, group, store.head_dim) and got.lse.shape == (blocks.blocks, group)
        tiles = [part[row, head].view(-1, 1, SIZE, store.head_dim) for part in (keys, values)]
        allowed = None if padding_mask is None else padding_mask[:, None, None]
        many = query[None, :, None].expand(blocks.blocks, -1, -1, -1)
        out, lse = naive.attention(many, *tiles, 0.4, softcap, allowed)
        torch.testing.assert_close(got.out.double(), out.squeeze(2), atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(got.lse.double(), lse.squeeze(2), atol=tolerance, rtol=tolerance)


def test_float64_is_left_to_torch_and_stays_float64():
    store, _ = filled(dtype=torch.float64)
    blocks, query = WholeBlocks(store), torch.randn(4, 16, dtype=torch.float64)
    assert not natively(query, blocks)
    got = attend_each(query, blocks, 0, 0, 0.4, None, None)
    assert got.out.dtype == got.lse.dtype == torch.float64


def test_a_chunk_waits_while_more_urgent_work_is_under_way():
    store, _ = filled()
    answers = [True, True, False]
    attend_each(torch.randn(4, 16), WholeBlocks(store), 0, 0, 0.4, None, None, busy=lambda: answers.pop(0))
    assert not answers


def upheaval(store):
    """All that can happen to a store while somebody still reads what it held."""
    twin = store.fork()
    store.append(*(torch.full((2, 3, 4, 16), 9.0) for _ in range(2)))
    store.crop(19)  # into the middle of a block
    store.append(*(torch.full((2, 3, 30, 16), 8.0) for _ in range(2)))
    store.select_rows(torch.tensor([1, 1]))
    twin.crop(3)
    twin.append(*(torch.full((2, 3, 90, 16), 7.0) for _ in range(2)))
    pool = store.table.pool
    del store, twin
    other = make_store(2, 3, 16, SIZE, torch.float32, "cpu")
    other.table.pool = pool  # a cache forked from the same prefix
    if pool.page_shape == other.table.pool.page_shape and pool.dtype == torch.float32:
        other.append(*(torch.full((2, 3, 200, 16), 6.0) for _ in range(2)))
    return pool


@pytest.mark.parametrize("host_dtype", [None, "int8"])
def test_held_blocks_stay_as_they_were(monkeypatch, host_dtype):
    naive.poison(monkeypatch)
    store, given = filled(host_dtype=host_dtype)
    blocks = WholeBlocks(store)
    before = store.read(0, blocks.tokens)
    assert (blocks.blocks, blocks.tokens) == (7, 56)
    upheaval(store)
    for row in range(2):
        for head in range(3):
            for got, held in zip(blocks.read(row, head, 0, 7), before):
                assert torch.equal(got.flatten(0, 1), held[row, head])
            keys, _ = blocks.read(row, head, 2, 5)
            assert torch.equal(keys.flatten(0, 1), before[0][row, head, 16:40])


def test_held_pages_are_given_back():
    store, _ = filled()
    pool = store.table.pool
    blocks = WholeBlocks(store)
    store.crop(0)
    assert pool.used_pages == 2 * 7
    del blocks
    assert pool.used_pages == 0


def test_holding_pages_costs_no_copy_of_the_block_being_filled():
    store, _ = filled()
    page = store.table.ids[:, -1].clone()
    blocks = WholeBlocks(store)
    store.append(torch.zeros(2, 3, 1, 16), torch.zeros(2, 3, 1, 16))
    assert torch.equal(store.table.ids[:, -1], page) and blocks.blocks == 7


# -- what was lost ---------------------------------------------------------------------------------------------


def of(sums):
    return dict(zip(NAMES, sums.tolist()))


def a_step(blocks=6, group=4, dim=16, seed=0):
    """Query, keys and values of whole blocks and a tail, and the partials that the sums are made from."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (group, blocks * SIZE + 3, blocks * SIZE + 3)
    query, keys, values = (torch.randn(size, dim, generator=generator, dtype=torch.float64) for size in sizes)

    def over(which):
        out, lse = naive.attention(query[None, :, None], keys[None, None, which], values[None, None, which], 0.5)
        return Partial(out[0, :, 0], lse[0, :, 0])

    places = torch.arange(len(keys))
    parts = [over(places[block * SIZE : (block + 1) * SIZE]) for block in range(blocks)]
    whole = (
        Partial(*map(torch.stack, zip(*parts)))
        if parts
        else Partial(query.new_empty(0, group, dim), query.new_empty(0, group))
    )
    return over, places, whole, over(places[blocks * SIZE :])


@pytest.mark.parametrize("marks", [[1, 1, 1, 1, 1, 1], [1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0]], ids=str)
def test_sums_of_one_head(marks):
    over, places, parts, tail = a_step()
    attended = torch.tensor(marks, dtype=torch.bool)
    exact = over(places)
    seen = over(torch.cat([places[:48].view(6, 8)[attended].flatten(), places[48:]]))
    made = seen.out + 0.1 * torch.randn(seen.out.shape, generator=torch.Generator().manual_seed(3))
    for predicted in (False, True):
        got = of(lost(parts, tail, attended, made, predicted))
        norm = exact.out.norm(dim=1)
        assert got["samples"] == 1 and got["predicted_samples"] == predicted
        assert got["mass"] == pytest.approx((seen.lse - exact.lse).exp().mean().item())
        assert got["output_error"] == pytest.approx(((made - exact.out).norm(dim=1) / norm).mean().item())
        assert got["selection_error"] == pytest.approx(((seen.out - exact.out).norm(dim=1) / norm).mean().item())
        error = ((made - seen.out).norm(dim=1) / norm).mean().item() if predicted else 0
        assert got["prediction_error"] == pytest.approx(error)
        masses = (parts.lse - exact.lse).exp().sum(1)
        best = set(masses.topk(sum(marks)).indices.tolist())
        hits = best & set(attended.nonzero()[:, 0].tolist())
        assert got["recall_samples"] == bool(best)
        assert got["block_recall"] == pytest.approx(len(hits) / max(len(best), 1))


def test_the_best_blocks_are_all_recalled_and_the_worst_are_none():
    over, places, parts, tail = a_step(blocks=12)
    order = (parts.lse - over(places).lse).exp().sum(1).argsort(descending=True)
    for chosen, recall in ((order[:4], 1), (order[-4:], 0), (torch.cat([order[:1], order[-3:]]), 0.25)):
        attended = torch.zeros(12, dtype=torch.bool).index_fill_(0, chosen, True)
        assert of(lost(parts, tail, attended, tail.out, False))["block_recall"] == recall


def test_blocks_of_tiny_mass_are_still_told_apart():
    """exp() of most of them is 0 in float32."""
    lse = torch.tensor([[-400.0], [-300.0], [-500.0], [0.0]])
    parts, tail = Partial(torch.ones(4, 1, 2), lse), Partial(torch.ones(1, 2), torch.tensor([-torch.inf]))
    for attended, recall in (([0, 1, 0, 1], 1), ([1, 0, 0, 1], 0.5), ([0, 0, 1, 1], 0.5)):
        found = of(lost(parts, tail, torch.tensor(attended, dtype=torch.bool), torch.ones(1, 2), False))
        assert found["block_recall"] == recall


def test_rows_without_anything_to_attend_and_empty_parts():
    nothing = Partial(torch.zeros(3, 2, 4), torch.full((3, 2), -torch.inf))
    empty = Partial(torch.zeros(2, 4), torch.full((2,), -torch.inf))
    marks = torch.tensor([True, False, False])
    assert not lost(nothing, empty, marks, torch.zeros(2, 4), True).any()
    tail = Partial(torch.ones(2, 4), torch.zeros(2))
    found = of(lost(nothing, tail, marks, torch.ones(2, 4), False))
    assert (found["samples"], found["mass"], found["output_error"]) == (1, 1, 0)
    over, places, parts, tail = a_step(blocks=0)
    found = of(lost(parts, tail, torch.zeros(0, dtype=torch.bool), tail.out, False))
    assert (found["mass"], found["output_error"], found["recall_samples"]) == (1, pytest.approx(0, abs=1e-9), 0)


# -- the monitor itself ------------------------------------------------------------------------------------------


class Layer:
    """A method's stand-in: one tier, two rows, three KV heads of four query heads each."""

    layer_idx, kv_heads, scoring = 5, 3, (0.4, None)

    def __init__(self, backend="torch", monitor=0.5):
        self.kv, _ = filled()
        self.length = self.kv.length
        self.counters, self.backend = Counters(), make_backend(backend)
        self.cache = SimpleNamespace(scout_config=SimpleNamespace(monitor=monitor), methods=[self])
        self.query = torch.randn(2, 12, 1, 16, generator=torch.Generator().manual_seed(4))

    def decode(self, monitor, heads=(1, 2), attended=None, predicted=False):
        self.counters.steps += 1
        self.counters.attended(self.layer_idx, 61, 61)
        step = SimpleNamespace(
            cache=self.cache, counters=self.counters, backend=self.backend, mask=None, watched={5: heads}
        )
        result = self.backend.attend_blocks(self.query, self.kv, attended and attended[0], *self.scoring).partial
        monitor.watch(step, self, self.query, result, lambda: attended, predicted)

    @property
    def fidelity(self):
        return summarise(self.counters, "scout", False, {}).fidelity


@pytest.fixture
def monitor():
    one = Monitor()
    yield one
    one.close()


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=NATIVE)])
@pytest.mark.parametrize("setting", [True, 0.5, 1.0])
def test_in_the_step_and_in_the_background_are_the_same(monitor, backend, setting):
    layer = Layer(backend, setting)
    lists = [BlockLists(torch.tensor([0, 3, 7]).expand(2, 3, 3), torch.tensor([[3, 2, 1], [3, 3, 0]]))]
    layer.decode(monitor, attended=lists)
    assert bool(monitor._pending) == (setting != 1.0 or setting is True)
    monitor.collect(wait=True)
    found = layer.fidelity
    assert (found.samples, found.skipped, found.prediction_error) == (4, 0, None)
    reference = Layer("torch", 1.0)
    reference.decode(monitor, attended=lists)
    for name in ("mass", "output_error", "block_recall"):
        assert getattr(found, name) == pytest.approx(getattr(reference.fidelity, name), rel=1e-4)
    assert 0 < found.mass < 1 and found.cost_ms > 0


def test_lists_picks_and_empty_slots_are_understood(monitor):
    """Residents with an empty slot, a choice of which some are resident, and entries that no list uses."""
    all_blocks = torch.arange(7)
    residents = torch.tensor([0, -1, 4]).expand(2, 3, 3)
    wanted = torch.tensor([4, 2, 6, 1]).expand(2, 3, 4)
    pieces = [Pick(residents, residents >= 0), Pick(wanted, torch.tensor([False, True, True, False]).expand(2, 3, 4))]
    whole = [BlockLists(torch.tensor([0, 2, 4, 6, 3, 5]).expand(2, 3, 6), torch.full((2, 3), 4))]
    marks = [torch.isin(all_blocks, torch.tensor([0, 2, 4, 6])).expand(2, 2, 7)]
    from scout_hf.monitor import _marks

    for attended in (pieces, whole):
        assert torch.equal(_marks(attended, [0, 2], 2, 7, torch.device("cpu")), marks[0])
    assert _marks(None, [1], 2, 7, torch.device("cpu")).all() and not _marks([], [1], 2, 7, torch.device("cpu")).any()


def test_decoding_continues_while_a_sample_is_late_and_none_is_lost(monitor):
    gate, layer = threading.Event(), Layer()
    real = monitor._measure
    monitor._measure = lambda *args: gate.wait(60) and real(*args)
    for _ in range(MOST_PENDING + 3):
        layer.decode(monitor)
    assert len(monitor._pending) == MOST_PENDING and layer.fidelity is None
    gate.set()
    monitor.collect(wait=True)
    assert (layer.fidelity.samples, layer.fidelity.skipped) == (4 * MOST_PENDING, 4 * 3)
    layer.decode(monitor)
    monitor.collect(wait=True)
    assert layer.fidelity.samples == 4 * MOST_PENDING + 4


def test_what_is_done_is_collected_at_the_next_step(monitor):
    layer = Layer()
    layer.decode(monitor)
    monitor._pending[0].ticket.wait()
    layer.decode(monitor)
    assert layer.fidelity.samples == 4 and len(monitor._pending) == 1


def test_an_error_is_counted_and_told_once(monitor):
    layer = Layer()

    def fail(*args):
        raise MemoryError("planted")

    monitor._measure = fail
    with pytest.warns(RuntimeWarning, match="layer 5.*MemoryError: planted.*not affected"):
        for _ in range(3):
            layer.decode(monitor)
        monitor.collect(wait=True)
    del monitor._measure
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("scout_hf.monitor._sample", fail)
            layer.decode(monitor)
        layer.decode(monitor)
        monitor.collect(wait=True)
    assert (layer.fidelity.samples, layer.fidelity.skipped) == (4, 16)


def test_an_interrupt_is_not_swallowed_and_loses_one_sample(monitor, monkeypatch):
    layer = Layer()
    with monkeypatch.context() as patch:

        def interrupt(*args):
            raise KeyboardInterrupt

        patch.setattr("scout_hf.monitor._sample", interrupt)
        with pytest.raises(KeyboardInterrupt):
            layer.decode(monitor)
    layer.decode(monitor)
    monitor.collect(wait=True)
    assert layer.fidelity.samples == 4


def test_forget_drops_what_is_on_its_way(monitor):
    layer = Layer()
    layer.decode(monitor)
    monitor.forget()
    monitor.collect(wait=True)
    assert layer.fidelity is None


def test_copies_start_from_nothing_and_closing_is_not_the_end(monitor):
    layer = Layer("native" if ISAS else "torch")
    layer.decode(monitor)
    for twin in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert not twin._pending and twin._pool is None
    monitor.close()
    assert layer.fidelity.samples == 4
    layer.decode(monitor)
    monitor.collect(wait=True)
    assert layer.fidelity.samples == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=NATIVE)])
def test_a_forked_child_waits_for_nobody(monitor, backend):
    layer, gate = Layer(backend), threading.Event()
    real = monitor._measure
    layer.decode(monitor)
    monitor.collect(wait=True)
    monitor._measure = lambda *args: gate.wait(60) and real(*args)
    layer.decode(monitor)
    child = os.fork()
    if not child:
        signal.alarm(60)
        # A fork does not bring the threads of torch's team along: what asks for them would wait for ever.
        torch.set_num_threads(1)
        monitor._measure = real
        monitor.collect(wait=True)
        alone = layer.fidelity.samples
        layer.decode(monitor)
        monitor.collect(wait=True)
        os._exit(0 if (alone, layer.fidelity.samples) == (4, 8) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.set()
    monitor.collect(wait=True)
    assert layer.fidelity.samples == 8


# -- in print ----------------------------------------------------------------------------------------------------


def test_the_table_says_what_was_lost():
    counters = Counters()
    counters.steps = 10
    for layer, scale in ((0, 1), (3, 2)):
        counters.attended(layer, 100, 20)
        sums = [4, 4 - 0.028 * scale, 0.084 * scale, 0.08 * scale, 2, 0.01, 4, 3.0]
        for name, amount in zip(NAMES, sums):
            counters.add(f"monitor_{name}", layer, amount)
        counters.add("monitor_ms", layer, 7.5)
    counters.add("monitor_skipped", 3, 5)
    stats = summarise(counters, "scout", False, {})
    found = stats.fidelity
    assert (found.samples, found.skipped, found.cost_ms) == (8, 5, pytest.approx(1.5))
    assert found.mass == pytest.approx((8 - 0.084) / 8) and found.output_error == pytest.approx(0.252 / 8)
    assert found.prediction_error == pytest.approx(0.005) and found.block_recall == pytest.approx(0.75)
    assert [layer.fidelity.samples for layer in stats.layers] == [4, 4]
    assert stats.layers[1].fidelity.mass == pytest.approx(1 - 0.014)
    assert str(found) == "captured attention mass 0.990, output error 3.1%, 8 samples"
    text = str(stats)
    for part in (
        "attention mass 0.990, output error 3.1%",
        "selection 3.0%, predicted query 0.5%",
        "8 samples, 5 skipped; 1.50 ms of CPU per step",
        "what was lost",
    ):
        assert part in text, part
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert ["0", "0.993", "2.1%", "2.0%", "0.5%", "0.750", "4"] in rows


def test_nothing_is_said_without_a_monitor():
    counters = Counters()
    counters.attended(0, 10, 10)
    stats = summarise(counters, "scout", True, {})
    assert stats.fidelity is None and stats.layers[0].fidelity is None and "captured" not in str(stats)
