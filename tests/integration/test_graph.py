"""Decode steps captured once and run again: with graphs that do on the CPU what CUDA graphs do, see ``fake_graph``."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch

pytest.importorskip("triton")

import scout_hf  # noqa: E402
from scout_hf import RecallIntervals  # noqa: E402
from scout_hf.graph import StepGraphs  # noqa: E402
from scout_hf.graph_clock import Clock  # noqa: E402
from scout_hf.methods.scout import query_gate  # noqa: E402
from scout_hf.methods.scout.policy import TwoTierScout  # noqa: E402
from scout_hf.selection import MinMax  # noqa: E402
from scout_hf.stores.streams import Links  # noqa: E402
from tests.integration import fake_graph  # noqa: E402
from tests.integration.common import (  # noqa: E402
    LOSSY,
    MODES,
    TWO_TIERS,
    assert_close,
    assert_equal,
    left_padded,
    llama,
    prompt,
    run,
    stock_mode,
)
from tests.integration.disturbances import late  # noqa: E402
from tests.integration.executors import count_every_share  # noqa: E402
from tests.libraries import ISAS  # noqa: E402
from tests.patches.tiny import tiny_model  # noqa: E402
from tests.triton import reference  # noqa: E402

pytestmark = pytest.mark.skipif(not ISAS, reason="needs the native library")

EXACT = TWO_TIERS | {"cpu_query": "real", "layer_ahead": True}
SPARSE = LOSSY | {"digest": "minmax", "resident": None}


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    reference.install(monkeypatch)
    return fake_graph.install(monkeypatch)


def replays(graphs):
    return sum(graph.replays for graph in graphs.made)


def decode(way, inputs, options, new=60, model=None):
    with scout_hf.patch(model or llama(), **options, hand_over=way) as handle:
        return run(handle.model, inputs, new=new), handle.stats()


@pytest.mark.parametrize("inputs", [prompt(2, 60), left_padded(0, 13, tokens=60)], ids=["rows", "padded"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cpu_query": "real"},
        {"cpu_query": "auto"},
        {"cpu_query": "auto", "recall": None},
        {"layer_ahead": False, "recall": None},
        # Shares at which no recall falls on a step that also fills an empty slot: there the order is another one.
        {"recall": 0.2},
        {"recall": 0.5},
        {"recall": 3},
        {"recall": RecallIntervals((1, 2, 0, 5), 0.12, "llama")},
        {"recall": None},
        {"budget": None},
        {"budget": 80},
        {"dense_layers": (1,)},
        {"window": 0, "sinks": 0},
        {"digest": "sign", "block_size": 16, "budget": 32},
        {"digest": "sign2"},
        {"digest": "minmax"},
    ],
    ids=str,
)
@pytest.mark.thin(2)
def test_captured_steps_do_what_plain_ones_do(graphs, monkeypatch, inputs, options):
    count_every_share(monkeypatch)
    options = SPARSE | options
    # With "auto" both compare in the first step alone, and find opposite things by the two settings of that rule.
    monkeypatch.setattr(query_gate, "CHECK_EVERY", 1000)
    monkeypatch.setattr(query_gate, "TOLERATED", 1000 if options["recall"] is None else 0)
    expected, theirs = decode("flags", inputs, options, 28, llama(num_hidden_layers=4))
    assert not graphs.made
    got, ours = decode("graph", inputs, options, 28, llama(num_hidden_layers=4))
    assert_close(got, expected, 2e-6)
    assert replays(graphs) >= 18 and len(graphs.made) <= 8
    assert (ours.recalled_blocks > 0) == (theirs.recalled_blocks > 0)
    for one, other in zip(ours.layers, theirs.layers):
        assert one.attended_tokens == pytest.approx(other.attended_tokens, rel=0.03)  # less the last share
        assert one.recalled_bytes == one.recalled_blocks * 2 * options["block_size"] * 8 * 4
        if options["recall"] == 1 and options["budget"] == 24:
            assert one.recalled_blocks == pytest.approx(other.recalled_blocks, rel=0.3)
        assert one.cpu_ratio is None or one.cpu_ratio == pytest.approx(other.cpu_ratio, abs=0.03)


def test_most_steps_are_one_launch(graphs):
    """Write-back alone makes nothing void; outgrown buffers do."""
    got, _ = decode("graph", prompt(1, 60), EXACT, new=120)
    assert_close(got, run(llama(), prompt(1, 60), new=120))
    assert len(graphs.made) <= 6 and replays(graphs) >= 110


@pytest.mark.parametrize("way", ["join", "flags", "graph"])
def test_slots_that_grow_with_the_context(graphs, monkeypatch, way):
    """They move, which makes captured steps void, and hold what slots for everything from the start would hold."""
    options = SPARSE | {"cpu_query": "real", "budget": 48, "resident": 160}
    expected, theirs = decode(way, left_padded(0, 13, tokens=60), options)
    monkeypatch.setattr("scout_hf.methods.scout.policy.SPARE_BLOCKS", 1)
    got, ours = decode(way, left_padded(0, 13, tokens=60), options)
    assert_close(got, expected)
    assert [one.recalled_blocks for one in ours.layers] == [one.recalled_blocks for one in theirs.layers]
    slots = [output.past_key_values.scout_layers[0].method.resident.slots for output in (got, expected)]
    assert 7 < slots[0] < slots[1] == 20
    assert way != "graph" or replays(graphs) >= 80


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_generate(mode):
    inputs, options = MODES[mode]
    model, expected = llama(), stock_mode(mode)
    with scout_hf.patch(model, **EXACT, hand_over="graph"):
        torch.manual_seed(0)
        assert_close(run(model, inputs, **options), expected)


def test_two_caches_by_turns(graphs):
    stock, model = llama(), llama()
    with scout_hf.patch(model, **EXACT, hand_over="graph") as handle, torch.no_grad():
        caches = [handle.new_cache() for _ in range(2)]
        for seed, cache in enumerate(caches):
            model(prompt(1, 60, seed), past_key_values=cache)
        for step in range(12):
            for seed, cache in enumerate(caches):
                got = model(prompt(1, 1, step), past_key_values=cache).logits
                ids = torch.cat([prompt(1, 60, seed), *(prompt(1, 1, before) for before in range(step + 1))], dim=1)
                assert (got[:, -1] - stock(ids).logits[:, -1]).abs().max() <= 3e-6
        assert replays(graphs) == 20


def test_what_is_kept_of_a_step_stays(graphs):
    model = llama()
    with scout_hf.patch(model, **EXACT, hand_over="graph") as handle, torch.no_grad():
        cache = handle.new_cache()
        model(prompt(), past_key_values=cache)
        kept = [model.model(prompt(1, 1, seed), past_key_values=cache).last_hidden_state for seed in range(8)]
        again = [one.clone() for one in kept]
        model(prompt(1, 1), past_key_values=cache)
        assert all(torch.equal(one, other) for one, other in zip(kept, again)) and replays(graphs) == 7


def test_late_jobs_change_nothing(graphs, monkeypatch):
    expected, _ = decode("graph", left_padded(0, 13), SPARSE, new=24)
    late(monkeypatch)
    assert_equal(decode("graph", left_padded(0, 13), SPARSE, new=24)[0], expected)


def test_a_step_that_cannot_be_captured_is_made_as_usual(graphs, monkeypatch):
    real = graphs.capture

    def fail(graph, run, join):
        real(graph, lambda: None, join)
        raise RuntimeError("operation not permitted when stream is capturing")

    expected, _ = decode("flags", prompt(2, 60), SPARSE, new=24)
    monkeypatch.setattr(graphs, "capture", fail)
    with pytest.warns(UserWarning, match="continues without graphs, .* not permitted"):
        got, _ = decode("graph", prompt(2, 60), SPARSE, new=24)
    assert_close(got, expected, 2e-6)
    assert len(graphs.made) == 1


def test_a_number_read_back_is_no_step_to_capture(monkeypatch):
    """That the fake refuses what CUDA refuses."""
    merge = reference.KERNELS.merge

    def reads_back(parts, *more, dtype):
        return merge(parts * float(parts.sum() > -1e9), *more, dtype=dtype)

    monkeypatch.setattr(reference.KERNELS, "merge", reads_back)
    with pytest.warns(UserWarning, match="_local_scalar_dense"):
        decode("graph", prompt(), SPARSE, new=24)


@pytest.mark.parametrize("at", ["capture", "replay"])
def test_an_interrupt_leaves_the_cache_as_it_was(graphs, monkeypatch, at):
    model, ids = llama(), prompt(1, 70)
    with scout_hf.patch(model, **EXACT, hand_over="graph") as handle, torch.no_grad():
        cache = handle.new_cache()
        model(ids[:, :40], past_key_values=cache)
        for place in range(40, 42 if at == "capture" else 46):
            model(ids[:, place : place + 1], past_key_values=cache)
        length, real = cache.get_seq_length(), getattr(graphs, at)

        def interrupt(graph, *args):
            real(graph, *args)
            raise KeyboardInterrupt

        monkeypatch.setattr(graphs, at, interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, length : length + 1], past_key_values=cache)
        monkeypatch.setattr(graphs, at, real)
        assert cache.get_seq_length() == length
        stock = llama()(ids).logits
        for place in range(length, 70):
            got = model(ids[:, place : place + 1], past_key_values=cache).logits[:, 0]
            assert (got - stock[:, place]).abs().max() <= 3e-6


@pytest.mark.parametrize("at", ["capture", "replay", "count", "mark", "filling", "filled"])
@pytest.mark.parametrize("first", [True, False], ids=["captured", "again"])
def test_an_interrupt_while_a_block_moves_leaves_the_cache_as_it_was(graphs, monkeypatch, at, first):
    """Whether the device has moved it or not, which the host does not know."""
    block, total = EXACT["block_size"], 80
    model, ids, begin = llama(), prompt(1, 80), 44
    owner, name = {
        "capture": (fake_graph.FakeFill, "capture"), "replay": (fake_graph.FakeFill, "replay"),
        "count": (Clock, "count_fill"), "mark": (Links, "mark"),
        "filling": (TwoTierScout, "filling"), "filled": (TwoTierScout, "filled"),
    }[at]  # fmt: skip
    with scout_hf.patch(model, **EXACT, hand_over="graph") as handle, torch.no_grad():
        cache = handle.new_cache()
        model(ids[:, :begin], past_key_values=cache)
        stop = (begin // block + (1 if first else 2)) * block - 1
        for place in range(begin, stop):
            model(ids[:, place : place + 1], past_key_values=cache)
        calls, real = [], getattr(owner, name)

        def interrupt(*args):
            found = real(*args)
            calls.append(1)
            if len(calls) == 2 or at in ("capture", "replay", "count", "mark"):
                raise KeyboardInterrupt
            return found

        monkeypatch.setattr(owner, name, interrupt)
        if at in ("capture", "count") and not first:
            model(ids[:, stop : stop + 1], past_key_values=cache)
            assert not calls
            stop += 1
        else:
            with pytest.raises(KeyboardInterrupt):
                model(ids[:, stop : stop + 1], past_key_values=cache)
        monkeypatch.setattr(owner, name, real)
        assert cache.get_seq_length() == stop
        stock = llama()(ids).logits
        for place in range(stop, total):
            got = model(ids[:, place : place + 1], past_key_values=cache).logits[:, 0]
            assert (got - stock[:, place]).abs().max() <= 3e-6


def test_a_copy_of_a_cache_shares_no_page_that_is_still_to_be_written(graphs):
    model, stock, ids = llama(), llama(), prompt(2, 60)
    with scout_hf.patch(model, **EXACT, hand_over="graph") as handle, torch.no_grad():
        cache = handle.new_cache()
        model(ids[:, :40], past_key_values=cache)
        for place in range(40, 60):
            model(ids[:, place : place + 1], past_key_values=cache)
        caches = [cache, copy.deepcopy(cache)]
        caches[1].reorder_cache(torch.tensor([1, 0]))
        rows = [ids, ids[[1, 0]]]
        for step in range(24):
            for which in (0, 1):
                new = prompt(2, 1, 2 * step + which)
                rows[which] = torch.cat([rows[which], new], dim=1)
                got = model(new, past_key_values=caches[which]).logits[:, -1]
                assert (got - stock(rows[which]).logits[:, -1]).abs().max() <= 3e-6
    assert sum(graph.replays for graph in fake_graph.FakeFill.made) >= 4


def test_a_digest_that_asks_the_device_is_encoded_layer_by_layer(graphs, monkeypatch):
    monkeypatch.setattr(reference.KERNELS, "encode", lambda *args: None)
    encode = MinMax.encode
    expected, _ = decode("flags", prompt(2, 60), SPARSE | {"recall": None}, new=30)
    monkeypatch.setattr(MinMax, "encode", lambda *args: encode(*args) + float(args[1].sum()) * 0)
    with pytest.warns(UserWarning, match="back layer by layer, .* not permitted"):
        got, _ = decode("graph", prompt(2, 60), SPARSE | {"recall": None}, new=30)
    assert_close(got, expected, 2e-6)
    assert len(fake_graph.FakeFill.made) == 1 and replays(graphs) >= 20


def test_removal_copies_and_pickles():
    model = llama()
    assert "forward" not in model.model.__dict__
    handle = scout_hf.patch(model, **EXACT, hand_over="graph")
    run(model, prompt(), new=6)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.model.forward._forward.__self__ is twin.model
        assert_close(run(twin, prompt(), new=8), run(llama(), prompt(), new=8))
    handle.remove()
    assert "forward" not in model.model.__dict__
    with scout_hf.patch(model, **EXACT, hand_over="flags"):
        assert "forward" not in model.model.__dict__


@pytest.mark.parametrize(
    "options", [{"budget": 0.3}, {"monitor": 1.0}, {"host_dtype": "int8"}, {"split": "off"}], ids=str
)
def test_what_no_graph_can_hold_runs_as_usual(graphs, options):
    decode("graph", prompt(), SPARSE | options, new=8)
    assert not graphs.made


def test_hidden_states_of_all_layers_are_no_graphs_matter(graphs):
    with scout_hf.patch(llama(), **EXACT, hand_over="graph") as handle:
        got = run(handle.model, prompt(), output_hidden_states=True)
    expected = run(llama(), prompt(), output_hidden_states=True)
    for one, other in zip(got.hidden_states, expected.hidden_states):
        assert all((a - b).abs().max() <= 1e-5 for a, b in zip(one, other))


def test_a_cache_goes_when_nobody_holds_it():
    model = llama()
    with scout_hf.patch(model, **EXACT, hand_over="graph"):
        cache = weakref.ref(run(model, prompt(), new=8).past_key_values)
        gc.collect()
        assert cache() is None


def test_inference_mode(graphs):
    model, ids = llama(), prompt(2, 60)
    expected = run(llama(), ids, new=12)
    with scout_hf.patch(model, **EXACT, hand_over="graph") as handle:
        with torch.inference_mode():
            got = run(model, ids, new=6)
        assert len(graphs.made) == 1 and replays(graphs) >= 3
        assert_close(run(model, ids, new=12), expected)
        assert torch.equal(got.sequences, expected.sequences[:, :66])
        assert handle.stats().layers[1].recalled_blocks is not None


def test_a_failure_is_not_tried_again(graphs, monkeypatch):
    def fail(graph, run, join):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(graphs, "capture", fail)
    model = llama()
    with scout_hf.patch(model, **EXACT, hand_over="graph"):
        with pytest.warns(UserWarning, match="continues without graphs"):
            run(model, prompt())
        run(model, prompt())
    assert len(graphs.made) == 1


def without_graphs(monkeypatch):
    """Steps of one model that run without a graph are noted, with whether they compare."""
    found, real = [], StepGraphs._call

    def call(graphs, step, given):
        found.append(step)
        return real(graphs, step, given)

    monkeypatch.setattr(StepGraphs, "_call", call)
    return found


@pytest.mark.parametrize("inputs", [prompt(2, 60), left_padded(0, 13, tokens=60)], ids=["rows", "padded"])
def test_queries_are_compared_now_and_then(graphs, monkeypatch, inputs):
    """Steps that compare run without a graph, and make no capture void where they find what they found before."""
    judged, judge = [], query_gate.QueryGate.judge
    monkeypatch.setattr(query_gate.QueryGate, "judge", lambda *args: judged.append(1) or judge(*args))
    monkeypatch.setattr("scout_hf.graph.COMPARE_EVERY", 5)
    monkeypatch.setattr(query_gate, "TOLERATED", 1000)
    steps = without_graphs(monkeypatch)
    options = SPARSE | {"cpu_query": "auto", "recall": None}
    decode("graph", inputs, options, 36, llama(num_hidden_layers=4))
    # The prompt, two steps to warm up, of which the first compares; then five replays between two that compare.
    compared = [number for number, step in enumerate(steps) if step.compares]
    assert compared == [8, 14, 20, 26, 32] and len(judged) == 3 * (1 + len(compared))
    assert len(graphs.made) == 1 and replays(graphs) == 35 - 2 - len(compared)


@pytest.mark.parametrize("cpu_query, ahead", [("predicted", True), ("auto", True), ("auto", False), ("real", False)])
def test_the_cpu_starts_a_layer_ahead_in_replays(graphs, monkeypatch, cpu_query, ahead):
    """The query of a layer is posted before the layer in front of it attends."""
    monkeypatch.setattr(query_gate, "TOLERATED", 1000 if ahead else 0)
    options = SPARSE | {"cpu_query": cpu_query, "recall": None}
    decode("graph", prompt(2, 60), options, 12, llama(num_hidden_layers=4))
    letters = {"post": "P", "merge": "M"}
    order = "".join(letters.get(func.__name__, "") for func, *_ in graphs.made[-1].log)
    assert order == ("PPM" + 2 * "PM" + "M" if ahead else 4 * "PM")


def test_what_a_comparison_finds_is_captured_anew(graphs, monkeypatch):
    monkeypatch.setattr("scout_hf.graph.COMPARE_EVERY", 5)
    monkeypatch.setattr(query_gate, "TOLERATED", 1000)
    options = SPARSE | {"cpu_query": "auto", "recall": None}
    with scout_hf.patch(llama(num_hidden_layers=4), **options, hand_over="graph") as handle, torch.no_grad():
        cache = handle.new_cache()
        handle.model(prompt(1, 61), past_key_values=cache)
        for step in range(16):
            if step == 10:  # the next comparison is in step 13
                monkeypatch.setattr(query_gate.QueryGate, "judge", lambda gate, *both: gate._learn(1e6))
            handle.model(prompt(1, 1, step), past_key_values=cache)
    first, second = graphs.made
    assert (first.replays, second.replays) == (10, 2)


def test_a_capture_is_not_taken_for_one_of_another_hand_over(graphs):
    """An object that lives in the key cannot be mistaken for one that took its place in memory."""
    with scout_hf.patch(llama(), **EXACT, hand_over="graph") as handle, torch.no_grad():
        cache = handle.new_cache()
        handle.model(prompt(), past_key_values=cache)
        for step in range(4):
            handle.model(prompt(1, 1, step), past_key_values=cache)
        executor = cache.layers[1].method.executor
        before = weakref.ref(executor.handoff)
        executor.handoff.lost = True
        cache.layers[1].method.changed()
        handle.model(prompt(1, 1), past_key_values=cache)
        assert executor.handoff is not before() is not None and len(graphs.made) == 1
        handle.model(prompt(1, 1), past_key_values=cache)
        gc.collect()
        assert before() is None and len(graphs.made) == 2


def test_threads_take_turns(graphs):
    model = llama()
    prompts = [prompt(1, 40, seed) for seed in range(3)]
    expected = [run(llama(), ids, new=20) for ids in prompts]
    found = {}

    def work(index):
        found[index] = [run(model, prompts[index], new=20) for _ in range(2)]

    with scout_hf.patch(model, **EXACT, hand_over="graph"):
        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert all(torch.equal(one.sequences, expected[index].sequences) for index in range(3) for one in found[index])


@pytest.mark.parametrize("rope", [{"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}])
def test_models_that_ask_the_device_are_not_captured(graphs, rope):
    model = llama()
    model.config.rope_parameters = rope
    with scout_hf.patch(model, **EXACT, hand_over="graph"):
        run(model, prompt())
    assert not graphs.made


def test_a_share_of_the_context_with_padding_far_away(monkeypatch):
    """Counts per row are known on the host and needed on the device."""
    monkeypatch.setattr("scout_hf.padding._is_far", lambda mask: True)
    options = SPARSE | {"budget": 0.3}
    expected, _ = decode("join", left_padded(0, 13), options, new=24)
    assert_close(decode("flags", left_padded(0, 13), options, new=24)[0], expected, 2e-6)


def test_steps_that_run_again_are_traced(graphs, tmp_path):
    pytest.importorskip("matplotlib")
    with scout_hf.patch(llama(), **SPARSE, hand_over="graph") as handle:
        with handle.trace(tmp_path / "step.json", steps=100) as trace:
            got = run(handle.model, prompt(1, 60), new=30)
        expected = run(handle.model, prompt(1, 60), new=30)
    assert_equal(got, expected)
    assert replays(graphs) > 20
    steps = [span for span in trace.spans if span.kind == "step"]
    jobs = [span for span in trace.spans if span.kind == "attention"]
    assert len(steps) == 29 and {span.layer for span in jobs} == {0, 1, 2}
    # Replays enter no layer, but the work of the host for each layer is recorded.
    last = [span for span in trace.spans if steps[-1].begin <= span.begin <= steps[-1].end]
    assert {span.kind for span in last} >= {"step", "ahead", "settle", "attention"}
    assert not any({"before_replay", "after_replay"} & set(vars(layer.method)) for layer in got.past_key_values.layers)


def test_linear_states_are_not_written_by_graphs(graphs):
    """Falcon-H1 keeps them in every layer: after a reordering a graph would write to tensors that are no more."""
    model, found = tiny_model("falcon_h1"), []
    for way in ("flags", "graph"):
        with scout_hf.patch(model, **EXACT, hand_over=way) as handle, torch.no_grad():
            cache = handle.new_cache()
            model(prompt(2, 60), past_key_values=cache, use_cache=True)
            for place in range(12):
                if place == 6:
                    cache.reorder_cache(torch.tensor([0, 1]))
                step(model, cache, place)
            found.append(step(model, cache.fork(), 20))
    assert (found[0] - found[1]).abs().max() <= 1e-5


def step(model, cache, seed):
    held = cache.get_seq_length()
    inputs = {"attention_mask": torch.ones(2, held + 1, dtype=torch.long), "position_ids": torch.full((2, 1), held)}
    return model(prompt(2, 1, seed=seed), **inputs, past_key_values=cache, use_cache=True).logits[:, -1]
