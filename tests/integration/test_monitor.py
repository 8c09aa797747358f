"""The fidelity monitor changes nothing, and tells the truth: against float64 over the cache's own keys and values."""

from __future__ import annotations

import copy
import functools
import gc
import threading
from contextlib import contextmanager

import pytest
import torch

import scout_hf
import scout_hf.eval.baselines  # noqa: F401  random blocks
from scout_hf.kernels.cpu.native_backend import NativeBackend
from scout_hf.kernels.cpu.step_jobs import NativeStepJob
from scout_hf.kernels.cpu.torch_backend import TorchBackend
from scout_hf.methods import Scout
from scout_hf.methods.scout.one_tier import OneTierScout
from scout_hf.stores.page_table import PageTable
from tests.integration.common import (
    LOSSY,
    ONE_TIER,
    TWO_TIERS,
    assert_equal,
    decode_after_holes,
    left_padded,
    llama,
    logits,
    prompt,
    run,
)
from tests.integration.disturbances import delayed_jobs, delayed_submit, refuse_thread, spoiled_buffers
from tests.integration.executors import WAYS as HANDED
from tests.integration.executors import use_triton
from tests.libraries import ISAS
from tests.patches.tiny import missing, tiny_model
from tests.unit.naive import poison

pytestmark = pytest.mark.usefixtures("monitored_at_once")

ONE_SPARSE = LOSSY | {"split": "off"}
WAYS = [pytest.param("torch"), pytest.param("native", marks=pytest.mark.skipif(not ISAS, reason="no native library"))]
INPUTS = {"one row": prompt(1, 60), "padded": left_padded(0, 13, 41, tokens=60)}
SPLITS = {"one tier": ONE_SPARSE, "two tiers": LOSSY}


def spiky(family="llama", **overrides):
    """Heads that look at a few tokens, so that a wrong block shows."""
    if family != "llama":
        return tiny_model(family, **overrides)
    return llama(**({"initializer_range": 0.12} | overrides))


# -- no output changes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("monitor", "pairs"), [(1.0, 13 * 6), (0.5, 13 * 3), (True, 2)])
@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("host_dtype", [None, "int8"])
@pytest.mark.thin(2)
def test_not_one_logit_changes(split, backend, monitor, pairs, host_dtype):
    model, options = spiky(), SPLITS[split] | {"cpu_backend": backend, "host_dtype": host_dtype}
    with scout_hf.patch(model, **options) as handle:
        expected = run(model, INPUTS["padded"], new=14)
        assert handle.stats().fidelity is None
    with scout_hf.patch(model, **options, monitor=monitor) as handle:
        assert_equal(run(model, INPUTS["padded"], new=14), expected)
        found = handle.stats().fidelity
    assert (found.samples, found.skipped) == (3 * pairs, 0)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3", "gpt_neox"])
@pytest.mark.parametrize("split", SPLITS)
def test_not_one_logit_of_another_family_changes(family, split):
    """Soft caps, learnt sinks, sliding layers, no groups."""
    if missing(family):
        pytest.skip(missing(family))
    model = tiny_model(family)
    with scout_hf.patch(model, **SPLITS[split]):
        expected = run(model, INPUTS["padded"])
    with scout_hf.patch(model, **SPLITS[split], monitor=0.6) as handle:
        assert_equal(run(model, INPUTS["padded"]), expected)
        assert handle.stats().fidelity.samples


# -- the truth ---------------------------------------------------------------------------------------------------------


class Reference:
    """Follows every decode step and works out in float64, per layer, what it lost."""

    def __init__(self, monkeypatch):
        self.steps: dict[int, list[dict[str, float]]] = {}
        self.jobs: dict[int, list] = {}
        for kind in (Scout, OneTierScout):
            monkeypatch.setattr(kind, "attend", self.attend(kind.attend))
        for kind in (NativeBackend, TorchBackend):
            for name in ("start", "attend_blocks"):
                monkeypatch.setattr(kind, name, self.asked(getattr(kind, name)))
        monkeypatch.setattr(NativeStepJob, "describe", self.asked_later(NativeStepJob.describe))

    def asked(self, real):
        """What the CPU attends is what a backend is asked for, perhaps one layer ahead."""

        def ask(backend, query, store, lists, *args):
            self.jobs.setdefault(id(store), []).append(lists)
            return real(backend, query, store, lists, *args)

        return ask

    def asked_later(self, real):
        """The lists are written until the job begins, and read here when it is over."""

        def ask(job, store, *args):
            self.jobs.setdefault(id(store), []).append(job._lists)
            return real(job, store, *args)

        return ask

    def attend(self, real):
        def attend(method, step, query):
            keys, values = (part.double().clone() for part in method.read_all())
            result = real(method, step, query)
            marks = self.attended(method, len(query))
            mask = torch.ones(len(query), method.length, dtype=torch.bool) if step.mask is None else step.mask
            found = self.judge(method, query.double(), result, keys, values, marks, mask)
            self.steps.setdefault(method.layer_idx, []).append(found)
            return result

        return attend

    def attended(self, method, rows):
        """Blocks that the backend was asked for, residents, and the tail; (rows, kv_heads, blocks) of bool."""
        size, host = method.config.block_size, getattr(method.kv, "host", method.kv)
        marks = torch.zeros(rows, method.kv_heads, -(-method.length // size), dtype=torch.bool)
        marks[:, :, host.length // size :] = True
        for lists in self.jobs.pop(id(host), []):
            if lists is None:
                marks[:] = True
                continue
            for row in range(rows):
                for head in range(method.kv_heads):
                    count = lists.ids.shape[2] if lists.counts is None else int(lists.counts[row, head])
                    marks[row, head, lists.ids[row, head, :count].long()] = True
        if getattr(method, "resident", None) is not None:
            for row, head, slot in (method.resident.ids >= 0).nonzero().tolist():
                marks[row, head, method.resident.ids[row, head, slot]] = True
        return marks

    def judge(self, method, query, result, keys, values, marks, mask):
        size, group = method.config.block_size, query.shape[1] // method.kv_heads
        keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
        scores = (query @ keys.transpose(2, 3))[:, :, 0] * method.scoring.scale
        if method.scoring.softcap is not None:
            scores = method.scoring.softcap * torch.tanh(scores / method.scoring.softcap)
        scores = scores.masked_fill(~mask[:, None], -torch.inf)
        lse, shares = scores.logsumexp(2), scores.softmax(2)
        seen = shares * marks.repeat_interleave(group, 1).repeat_interleave(size, 2)[:, :, : shares.shape[2]]
        exact = torch.einsum("bht,bhtd->bhd", shares, values)
        same = torch.einsum("bht,bhtd->bhd", seen, values) / seen.sum(2, keepdim=True)
        out, norm = result.out.double()[:, :, 0], exact.norm(dim=2)
        recalls = []
        whole = getattr(method.kv, "host", method.kv).length // size
        masses = shares[:, :, : whole * size].unflatten(1, (-1, group)).sum(2).unflatten(2, (whole, size)).sum(3)
        for row in range(len(query)):
            for head in range(method.kv_heads):
                if chosen := set(marks[row, head, :whole].nonzero()[:, 0].tolist()):
                    best = set(masses[row, head].topk(len(chosen)).indices.tolist())
                    recalls.append(len(chosen & best) / len(chosen))
        return {
            "mass": seen.sum(2).mean().item(),
            "mass by lse": (result.lse.double()[:, :, 0] - lse).exp().mean().item(),
            "output_error": ((out - exact).norm(dim=2) / norm).mean().item(),
            "selection_error": ((same - exact).norm(dim=2) / norm).mean().item(),
            "prediction_error": ((out - same).norm(dim=2) / norm).mean().item(),
            "block_recall": sum(recalls) / max(len(recalls), 1),
        }

    def mean(self, layer, name):
        return sum(step[name] for step in self.steps[layer]) / len(self.steps[layer])


TRUTHS = {
    "one tier": ONE_SPARSE,
    "one tier, a share": ONE_SPARSE | {"budget": 0.3, "sinks": 0, "window": 0},
    "two tiers, predicted": LOSSY,
    "two tiers, real on the CPU": LOSSY | {"cpu_query": "real"},
    "two tiers, not ahead": LOSSY | {"layer_ahead": False, "recall": None},
    "a dense layer": ONE_SPARSE | {"dense_layers": (1,)},
}


EXECUTED = [*((case, "torch") for case in TRUTHS), *((case, way) for case in TRUTHS if "two" in case for way in HANDED)]


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(("case", "executor"), EXECUTED)
@pytest.mark.thin(2)
def test_what_is_told_is_true(monkeypatch, case, executor, inputs, backend):
    if executor != "torch":
        use_triton(monkeypatch, executor)
    reference, model = Reference(monkeypatch), spiky()
    with scout_hf.patch(model, **TRUTHS[case], cpu_backend=backend, monitor=1.0) as handle:
        run(model, INPUTS[inputs], new=9)
        stats = handle.stats()
    rows = 1 if inputs == "one row" else 3
    for layer in stats.layers:
        found, index = layer.fidelity, layer.layer
        assert (found.samples, found.skipped) == (8 * 2 * rows, 0)
        # Two blocks of the same mass may change places by rounding.
        assert found.block_recall == pytest.approx(reference.mean(index, "block_recall"), abs=0.01)
        for name in ("mass", "output_error", "selection_error"):
            assert getattr(found, name) == pytest.approx(reference.mean(index, name), rel=1e-4, abs=1e-5), name
        predicts = "predicted" in case and index > 0
        assert (found.prediction_error is not None) == predicts
        if predicts:
            assert found.prediction_error == pytest.approx(reference.mean(index, "prediction_error"), rel=1e-4)
            assert found.prediction_error > 1e-3
        else:
            # The real query everywhere: what the step itself summed up says the same.
            assert found.mass == pytest.approx(reference.mean(index, "mass by lse"), rel=1e-4)
            assert found.selection_error == pytest.approx(found.output_error, rel=1e-3, abs=1e-5)
        if case == "a dense layer" and index == 1:
            assert found.mass == pytest.approx(1, abs=1e-6) and found.output_error < 1e-5 and found.block_recall == 1
        else:
            assert found.mass < 0.95 and found.output_error > 0.05
    assert stats.fidelity.samples == sum(layer.fidelity.samples for layer in stats.layers)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "gpt_neox"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_truth_with_soft_caps_and_learnt_sinks_and_without_groups(monkeypatch, family, split):
    """Sinks without a key are no part of it: neither the reference nor the sums know them."""
    if missing(family):
        pytest.skip(missing(family))
    reference, model = Reference(monkeypatch), tiny_model(family)
    with scout_hf.patch(model, **SPLITS[split], monitor=1.0) as handle:
        run(model, INPUTS["padded"], new=6)
    measured = [layer for layer in handle.stats().layers if layer.fidelity is not None]
    assert len(measured) == (4 if family == "gpt_neox" else 2)
    for layer in measured:
        for name in ("mass", "output_error", "selection_error"):
            expected = reference.mean(layer.layer, name)
            assert getattr(layer.fidelity, name) == pytest.approx(expected, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("split", SPLITS)
def test_the_truth_with_padding_inside_rows_and_at_their_end(monkeypatch, split, backend):
    """Padding among the newest tokens, which no block holds yet, must not count as context."""
    reference, model = Reference(monkeypatch), spiky()
    with scout_hf.patch(model, **SPLITS[split], cpu_backend=backend, monitor=1.0) as handle:
        decode_after_holes(model, handle.new_cache())
    for layer in handle.stats().layers:
        for name in ("mass", "output_error", "selection_error", "block_recall"):
            expected = reference.mean(layer.layer, name)
            assert getattr(layer.fidelity, name) == pytest.approx(expected, rel=1e-4, abs=1e-3), name


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("backend", WAYS)
def test_int8_is_compared_with_what_is_stored(monkeypatch, split, backend):
    """Rounded keys and values on both sides; residents may hold what the model made, the host the rounded ones."""
    reference, model = Reference(monkeypatch), spiky()
    options = SPLITS[split] | {"cpu_backend": backend, "host_dtype": "int8"}
    with scout_hf.patch(model, **options, monitor=1.0) as handle:
        run(model, INPUTS["padded"], new=10)
    for layer in handle.stats().layers:
        for name in ("mass", "output_error", "selection_error"):
            assert getattr(layer.fidelity, name) == pytest.approx(reference.mean(layer.layer, name), abs=5e-3), name


@pytest.mark.parametrize(
    ("dtype", "mass", "error"),
    [(torch.float64, 1e-12, 1e-12), (torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-5, 1e-2)],
)
@pytest.mark.parametrize("options", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])
@pytest.mark.parametrize("backend", WAYS)
def test_attending_to_everything_loses_nothing_but_rounding(backend, options, dtype, mass, error):
    model = spiky(dtype=dtype)
    with scout_hf.patch(model, **options, cpu_backend=backend, monitor=0.9) as handle:
        run(model, INPUTS["padded"])
        found = handle.stats().fidelity
    assert found.mass == pytest.approx(1, abs=mass)
    assert 0 < found.output_error < error and found.selection_error < error
    assert found.block_recall == 1 and found.prediction_error is None


def test_random_blocks_catch_less_than_chosen_ones():
    found = {}
    for digest in ("random", "minmax"):
        model = spiky(initializer_range=0.2)
        with (
            torch.random.fork_rng(devices=[]),
            scout_hf.patch(model, **ONE_SPARSE | {"window": 0, "sinks": 0, "digest": digest}, monitor=1.0) as handle,
        ):
            torch.manual_seed(0)
            run(model, prompt(4, 120), new=8)
            found[digest] = handle.stats().fidelity
    assert found["random"].mass < found["minmax"].mass - 0.1 and found["random"].mass < 0.5
    assert found["random"].block_recall < found["minmax"].block_recall - 0.1
    assert found["random"].output_error > found["minmax"].output_error


# -- jobs in the background --------------------------------------------------------------------------------------------


def measured(handle):
    """All numbers of all layers but the cost."""
    names = ("samples", "skipped", "mass", "output_error", "selection_error", "prediction_error", "block_recall")
    return [[getattr(layer.fidelity, name) for name in names] for layer in handle.stats().layers]


def eventful(model, handle):
    """Shared pages, copies before writing, cuts into blocks, caches that end at once and whose pages are used again."""
    run(model, INPUTS["padded"], new=5, num_beams=3)
    cache = run(model, prompt(), new=3).past_key_values
    twin = cache.fork()
    longer = torch.cat([prompt(), prompt(1, 20, seed=5)], dim=1)
    outs = [run(model, longer, new=3, past_key_values=twin)]
    del twin
    outs.append(run(model, longer[:, :-3], new=3, past_key_values=cache))
    with torch.no_grad():
        for drop in (3, 11, 1):
            cache.crop(-drop)
            for seed in range(2):
                model(prompt(1, 1, seed=seed), past_key_values=cache)
    cache.reset()
    repeated = prompt(1, 8).repeat(1, 6)
    outs.append(run(model, repeated, new=6, prompt_lookup_num_tokens=4))
    return outs


EVENTS = [
    *(("torch", None, way) for way in (delayed_jobs, delayed_submit, poison, spoiled_buffers)),
    *(("native", kind, way) for kind in (None, "int8") for way in (delayed_jobs, poison, spoiled_buffers) if ISAS),
]


@functools.cache
def two_layers():
    return spiky(num_hidden_layers=2)


def settings(split, backend, host_dtype):
    return SPLITS[split] | {"cpu_backend": backend, "host_dtype": host_dtype}


@functools.cache
def undisturbed(split, backend, host_dtype):
    """What is measured where nothing is late."""
    with scout_hf.patch(two_layers(), **settings(split, backend, host_dtype), monitor=0.5) as handle:
        eventful(two_layers(), handle)
        found = measured(handle)
    assert all(samples > 10 and not skipped for samples, skipped, *_ in found)
    return found


@pytest.mark.parametrize(("backend", "host_dtype", "disturb"), EVENTS)
@pytest.mark.parametrize("split", SPLITS)
def test_what_a_late_job_reads_has_not_changed(monkeypatch, split, backend, host_dtype, disturb):
    monkeypatch.setattr("scout_hf.monitor.MOST_PENDING", 10**9)
    model, expected = two_layers(), undisturbed(split, backend, host_dtype)
    with scout_hf.patch(model, **settings(split, backend, host_dtype), monitor=0.5) as handle:
        disturb(monkeypatch)
        if disturb is poison:
            late(monkeypatch, handle)
        eventful(model, handle)
        assert measured(handle) == expected


def late(monkeypatch, handle):
    """All jobs of the monitor run after everything else has happened."""
    gate, real = threading.Event(), handle._hooks.monitor._measure
    collect = handle._hooks.monitor.collect

    def open_and_collect(wait=False):
        if wait:
            gate.set()
        collect(wait)

    monkeypatch.setattr(handle._hooks.monitor, "_measure", lambda *args: gate.wait(120) and real(*args))
    monkeypatch.setattr(handle._hooks.monitor, "collect", open_and_collect)


@pytest.mark.parametrize("backend", WAYS)
def test_reading_pages_that_nobody_holds_is_seen(monkeypatch, backend):
    """Negative control of the NaN in pages that are used again."""
    model = spiky(num_hidden_layers=2)

    def unheld(table):
        twin = PageTable(table.pool, table.batch)
        twin.places, twin.blocks = table.places.clone(), table.blocks
        twin.release = lambda: None
        return twin

    with scout_hf.patch(model, **ONE_SPARSE, cpu_backend=backend, monitor=0.5) as handle:
        eventful(model, handle)
        expected = measured(handle)
        handle.reset_stats()
        poison(monkeypatch)
        late(monkeypatch, handle)
        run_unheld(monkeypatch, model, handle, unheld)
        assert measured(handle) != expected


def run_unheld(monkeypatch, model, handle, unheld):
    from scout_hf.stores import snapshot

    class Unheld(snapshot.WholeBlocks):
        def __init__(self, store):
            super().__init__(store)
            held, self._table = self._table, unheld(self._table)
            held.release()

        def __del__(self):
            self._table.blocks = 0  # nothing to give back

    monkeypatch.setattr("scout_hf.monitor.WholeBlocks", Unheld)
    eventful(model, handle)


@pytest.mark.parametrize("number", [1, 2])
def test_a_sample_whose_thread_does_not_start_is_noted_and_the_next_is_measured(monkeypatch, number):
    with scout_hf.patch(spiky(), **ONE_SPARSE, cpu_backend="torch", monitor=0.5) as handle:
        refuse_thread(monkeypatch, number)
        with pytest.warns(RuntimeWarning, match="the fidelity monitor could not measure"):
            run(handle.model, prompt(1, 60), new=14)
            found = handle.stats()
    assert 0 < found.fidelity.skipped < found.fidelity.samples
    assert any("monitor" in note and "can't start new thread" in note for note in found.notes)


@contextmanager
def held_up(handle):
    """Jobs of the monitor do not get anywhere until the end of the block."""
    gate, real = threading.Event(), handle._hooks.monitor._measure
    handle._hooks.monitor._measure = lambda *args: gate.wait(120) and real(*args)
    try:
        yield
    finally:
        gate.set()
        del handle._hooks.monitor._measure


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize("split", SPLITS)
def test_decoding_cropping_and_forking_wait_for_no_sample(split, backend):
    model = spiky()
    with scout_hf.patch(model, **SPLITS[split], cpu_backend=backend, monitor=0.5) as handle:
        with held_up(handle):
            outs = eventful(model, handle)
            gc.collect()
            pending = len(handle._hooks.monitor._pending)
        assert pending and handle.stats().fidelity.samples
        handle.reset_stats()
        again = eventful(model, handle)
    for one, other in zip(outs, again):
        assert torch.equal(logits(one), logits(other))


@pytest.mark.skipif(not ISAS, reason="no native library")
def test_its_native_thread_is_one_of_the_lowest_priority():
    with scout_hf.patch(spiky(), **LOSSY, cpu_backend="native", monitor=0.5) as handle:
        run(handle.model, prompt(), new=3)
        assert handle.stats().fidelity.samples and handle._hooks.monitor._pool.background


def test_tallies_that_start_again_know_nothing_of_samples_taken_before():
    model = spiky()
    with scout_hf.patch(model, **ONE_SPARSE, monitor=0.5) as handle:
        with held_up(handle):
            run(model, prompt(), new=3)
            assert handle._hooks.monitor._pending
            handle.reset_stats()
        assert handle.stats().fidelity is None


def test_samples_of_a_pass_that_failed_do_no_harm(monkeypatch):
    model = spiky()
    monkeypatch.setattr("scout_hf.monitor.MOST_PENDING", 10**9)
    # What a pass has recalled until it failed stays resident, and is attended.
    with scout_hf.patch(model, **LOSSY | {"recall": None}, monitor=0.5) as handle:
        expected = run(model, prompt())
        cache, real, calls = handle.new_cache(), model.model.layers[2].mlp.forward, []

        def fail(*args):
            calls.append(None)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(model.model.layers[2].mlp, "forward", fail)
        with held_up(handle), pytest.raises(KeyboardInterrupt):
            run(model, prompt(), past_key_values=cache)
        got = run(model, expected.sequences[:, :53], new=7, past_key_values=cache)
        assert torch.equal(got.sequences, expected.sequences)
        assert handle.stats().fidelity.skipped == 0


def test_a_failing_monitor_ends_no_generation(monkeypatch):
    model = spiky()
    with scout_hf.patch(model, **ONE_SPARSE, monitor=0.5) as handle:
        expected = run(model, prompt())
        samples = handle.stats().fidelity.samples

        def fail(*args):
            raise MemoryError("planted")

        monkeypatch.setattr("scout_hf.monitor.measure", fail)
        with pytest.warns(RuntimeWarning, match="MemoryError: planted"):
            assert_equal(run(model, prompt()), expected)
            found = handle.stats().fidelity
        assert (found.samples, found.skipped) == (samples, samples)


def test_removing_the_patch_keeps_what_was_measured():
    model = spiky()
    handle = scout_hf.patch(model, **ONE_SPARSE, monitor=0.5)
    run(model, prompt(), new=5)
    handle.remove()
    assert not handle._hooks.monitor._pending and handle.stats().fidelity.samples == 4 * 3
    with scout_hf.patch(model, **ONE_SPARSE) as again:
        run(model, prompt(), new=5)
        assert again.stats().fidelity is None


def test_a_cache_has_a_setting_of_its_own_and_copies_of_the_model_tallies_of_theirs():
    model = spiky()
    with scout_hf.patch(model, **ONE_SPARSE) as handle:
        run(model, prompt(), new=5, past_key_values=handle.new_cache(monitor=1.0))
        first = handle.stats().fidelity
        run(model, prompt(), new=5)
        assert first.samples == 4 * 6 == handle.stats().fidelity.samples
        twin = copy.deepcopy(model)
        run(twin, prompt(), new=3, past_key_values=handle.new_cache(monitor=0.5))
        assert handle.stats().fidelity.samples == 4 * 6
        scout_hf.unpatch(twin)
        handle.reset_stats()
        assert handle.stats().fidelity is None


def test_the_same_samples_every_time():
    found = []
    for _ in range(2):
        model = spiky()
        with scout_hf.patch(model, **LOSSY, monitor=0.3) as handle:
            for _ in range(2):
                run(model, INPUTS["padded"], new=9)
                found.append(measured(handle))
                handle.reset_stats()
    assert all(one == found[0] for one in found)
