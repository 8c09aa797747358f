"""Errors, delays and garbage in reused memory: errors surface and leave nothing behind, the rest changes nothing."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import scout_hf
from scout_hf.compat.cache_names import CACHE
from scout_hf.kernels.cpu.pool import NativePool
from scout_hf.kernels.cpu.torch_backend import TorchBackend
from scout_hf.methods.scout import executor_torch
from scout_hf.methods.scout.executor import StepState
from scout_hf.stores import memory
from tests.integration.common import (
    LOSSY,
    ONE_TIER,
    TOLERANCE,
    TWO_TIERS,
    assert_close,
    assert_equal,
    left_padded,
    llama,
    logits,
    one_llama,
    prompt,
    run,
    without_cache,
)
from tests.integration.disturbances import (
    DISTURBANCES,
    DISTURBED,
    INT8,
    NATIVELY,
    REAL_ATTEND,
    REAL_NATIVE_SUBMIT,
    REAL_PACK,
    RECALLING,
    TORCH,
    Planted,
    delayed_jobs,
    delayed_submit,
    raise_once,
    refuse_thread,
    spoiled_buffers,
)
from tests.libraries import ISAS
from tests.patches.tiny import tiny_model
from tests.saying import but_for_torchao

ROOT = Path(__file__).parents[2]


def decoded_around_a_failure(monkeypatch, options, steps=12, failing=5):
    """Residents and KV at a step, and all logits: where it failed once in the last layer, and where it did not."""
    model, ids, found = one_llama(), prompt(1, 50 + steps), []
    for raises in (True, False):
        with scout_hf.patch(model, **options) as handle, torch.no_grad():
            cache, rows = handle.new_cache(), []
            model(ids[:, :50], past_key_values=cache)
            for step in range(50, 50 + steps):
                token = ids[:, step : step + 1]
                if step == 50 + failing:
                    if raises:
                        with monkeypatch.context() as patch, pytest.raises(Planted):
                            raise_once(patch, model.model.layers[2].mlp, 0)
                            model(token, past_key_values=cache)
                    residents = [getattr(layer.method, "resident", None) for layer in cache.layers]
                    residents = [held.ids.clone() for held in residents if held is not None]
                    kv = [part for layer in cache.layers for part in (layer.keys, layer.values)]
                rows.append(model(token, past_key_values=cache).logits)
            found.append(SimpleNamespace(residents=residents, kv=kv, logits=torch.cat(rows)))
    return found


@pytest.mark.parametrize("options", [ONE_TIER, TWO_TIERS, LOSSY])
@pytest.mark.parametrize("after", [0, 1, 10])
def test_a_forward_that_raises(monkeypatch, options, after):
    """In prefill, in the first decode step and in a step in which a block was written back."""
    model = llama()
    with scout_hf.patch(model, **options) as handle:
        expected = run(model, prompt(), new=14)
        raise_once(monkeypatch, model.model.layers[2].mlp, after)
        cache = handle.new_cache()
        with pytest.raises(Planted):
            run(model, prompt(), new=14, past_key_values=cache)
        length = 50 + after - 1 if after else 0
        assert [layer.get_seq_length() for layer in cache.layers] == [length] * 3
        assert_equal(run(model, prompt(), new=14), expected)


@pytest.mark.parametrize("options", [ONE_TIER, TWO_TIERS])
@pytest.mark.parametrize("after", [1, 10])
def test_going_on_with_the_cache_of_a_forward_that_raised(monkeypatch, options, after):
    model = llama()
    expected = run(model, prompt(), new=14)
    with scout_hf.patch(model, **options) as handle:
        raise_once(monkeypatch, model.model.layers[2].mlp, after)
        cache = handle.new_cache()
        with pytest.raises(Planted):
            run(model, prompt(), new=14, past_key_values=cache)
        known = expected.sequences[:, : 50 + after]
        got = run(model, known, new=14 - after, past_key_values=cache)
    assert torch.equal(got.sequences, expected.sequences)
    assert (logits(got) - logits(expected)[after:]).abs().max() <= 3e-6


@pytest.mark.parametrize(
    "options",
    [ONE_TIER, TWO_TIERS, {"budget": 24, "block_size": 8, "split": "off"}, LOSSY | {"recall": None}],
    ids=["one tier, exact", "two tiers, exact", "one tier", "no recall"],
)
def test_a_failed_pass_changes_nothing_of_what_follows(monkeypatch, options):
    failed, calm = decoded_around_a_failure(monkeypatch, options)
    assert len(failed.residents) == (0 if options["split"] == "off" else 3)
    assert all(map(torch.equal, failed.kv + failed.residents, calm.kv + calm.residents))
    assert torch.equal(failed.logits, calm.logits)


def test_blocks_recalled_in_a_failed_pass_stay_resident(monkeypatch):
    """With a budget, on two tiers: which blocks are attended after it may differ, the keys and values do not."""
    failed, calm = decoded_around_a_failure(monkeypatch, LOSSY)
    assert all(map(torch.equal, failed.kv, calm.kv))
    assert not all(map(torch.equal, failed.residents, calm.residents))
    assert not torch.equal(failed.logits, calm.logits)


def test_a_second_turn_that_raises(monkeypatch):
    """Several new tokens on top of a cache: it goes back to where the turn began."""
    model, ids = llama(), prompt(1, 80)
    expected = run(model, ids)
    with scout_hf.patch(model, **TWO_TIERS) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(ids[:, :50], past_key_values=cache)
        raise_once(monkeypatch, model.model.layers[2].self_attn.o_proj, 0)
        with pytest.raises(Planted):
            model(ids[:, 50:], past_key_values=cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [50] * 3
        assert_close(run(model, ids, past_key_values=cache), expected)


@pytest.mark.parametrize("after", [1, 10])
def test_a_hybrid_model_that_raises(monkeypatch, after):
    """Sliding-window layers cannot be rolled back: going on must be right or refused, never silently wrong."""
    model = tiny_model("qwen2_sliding")
    expected = run(model, prompt(), new=14)
    with scout_hf.patch(model, **TWO_TIERS) as handle:
        raise_once(monkeypatch, model.model.layers[2].mlp, after)
        cache = handle.new_cache()
        with pytest.raises(Planted):
            run(model, prompt(), new=14, past_key_values=cache)
        known = expected.sequences[:, : 50 + after]
        try:
            got = run(model, known, new=14 - after, past_key_values=cache)
        except scout_hf.CacheStateError:
            return
    assert (logits(got) - logits(expected)[after:]).abs().max() <= 1e-4


def raise_in_torch(monkeypatch, plant):
    """The job itself, in its thread."""

    def attend_blocks(*args):
        plant()
        return REAL_ATTEND(*args)

    monkeypatch.setattr(TorchBackend, "attend_blocks", attend_blocks)


def raise_at_submit(monkeypatch, plant):
    """The native pool does not take the job. Copies for a recall have no result."""

    def submit(*args, **options):
        if "result" in options:
            plant()
        return REAL_NATIVE_SUBMIT(*args, **options)

    monkeypatch.setattr(NativePool, "submit", submit)


def raise_in_native_code(monkeypatch, plant):
    """A job that finds a block which is not there, and says so when it is joined."""

    def pack_lists(*args):
        lists = REAL_PACK(*args)
        if not lists.counts.any():
            return lists  # no block would be looked for
        try:
            plant()
        except Planted:
            lists.ids.fill_(2**20)
        return lists

    monkeypatch.setattr(executor_torch, "pack_lists", pack_lists)


NATIVE = pytest.mark.skipif(not ISAS, reason="no native library")
JOB_ERRORS = [
    pytest.param("torch", raise_in_torch, Planted),
    pytest.param("native", raise_at_submit, Planted, marks=NATIVE),
    pytest.param("native", raise_in_native_code, RuntimeError, marks=NATIVE),
]


@pytest.mark.parametrize("host_dtype", [None, "int8"])
@pytest.mark.parametrize(("backend", "way", "error"), JOB_ERRORS)
def test_a_cpu_job_that_raises(monkeypatch, backend, way, error, host_dtype):
    model, calls = llama(), []

    def plant():
        calls.append(None)
        if len(calls) == 6:
            raise Planted("planted")

    with scout_hf.patch(model, **LOSSY, cpu_backend=backend, host_dtype=host_dtype) as handle:
        expected = run(model, prompt())
        way(monkeypatch, plant)
        cache, passes = handle.new_cache(), []
        # Layers whose blocks are all resident have no job, so it depends on the blocks which pass fails.
        model.model.embed_tokens.register_forward_hook(lambda *_: passes.append(None))
        with pytest.raises(error):
            run(model, prompt(), past_key_values=cache)
        assert len(passes) > 2
        assert [layer.get_seq_length() for layer in cache.layers] == [prompt().shape[1] + len(passes) - 2] * 3
        assert all(layer.method.state == StepState() for layer in cache.layers)
        assert_equal(run(model, prompt()), expected)
        assert len(calls) > 6


@pytest.mark.parametrize("backend", RECALLING, ids=str)
def test_a_recall_that_raises(monkeypatch, backend):
    """In Python's thread, or where the native pool says at the join that it never ran."""
    model = llama()
    with scout_hf.patch(model, **LOSSY, **backend) as handle:
        expected = run(model, prompt())

        def fail(*args, **options):
            raise Planted("planted")

        with monkeypatch.context() as planted:
            planted.setattr("scout_hf.stores.resident_slots.Recall.run", fail)
            never_run = SimpleNamespace(wait=fail, drain=lambda: False)
            planted.setattr("scout_hf.kernels.cpu.native_backend.NativeBackend.copy", lambda *args, **_: never_run)
            cache = handle.new_cache()
            with pytest.raises(Planted):
                run(model, prompt(), past_key_values=cache)
        assert len({layer.get_seq_length() for layer in cache.layers}) == 1
        assert_equal(run(model, prompt()), expected)


INPUTS = {"one row": prompt(tokens=53), "padded": left_padded(0, 13, tokens=53)}
"""Three tokens before a block is full, eleven before two are."""
TIERS = {"two tiers": LOSSY, "one tier": {"budget": 24, "block_size": 8, "split": "off"}}


def by_setting(function):
    """Call it once for every backend and further arguments."""
    found = {}

    def once(backend, *names):
        key = (*backend.items(), *names)
        if key not in found:
            found[key] = function(backend, *names)
        return found[key]

    return once


@by_setting
def undisturbed(backend, tiers, inputs):
    with scout_hf.patch(one_llama(), **TIERS[tiers], **backend) as handle:
        expected = without_cache(run(one_llama(), INPUTS[inputs], new=13))
        if tiers == "two tiers":
            assert handle.stats().recalled_blocks and handle.stats().cpu_ratio and handle.stats().cosine
    return expected


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("tiers", TIERS)
@DISTURBED
@pytest.mark.thin(2)
def test_not_one_logit_changes(monkeypatch, backend, disturb, tiers, inputs):
    model, expected = one_llama(), undisturbed(backend, tiers, inputs)
    with scout_hf.patch(model, **TIERS[tiers], **backend):
        disturb(monkeypatch)
        for _ in range(2):
            assert_equal(run(model, INPUTS[inputs], new=13), expected)


@pytest.mark.parametrize(
    ("backend", "disturb"), [one for one in DISTURBANCES if one[1] in (delayed_jobs, delayed_submit)]
)
def test_a_late_recall_is_waited_for(monkeypatch, backend, disturb):
    """With a single layer no other layer's job stands between a recall and the slots being read."""
    model = llama(num_hidden_layers=1)
    with scout_hf.patch(model, **LOSSY, **backend) as handle:
        expected = run(model, INPUTS["one row"], new=13)
        assert handle.stats().recalled_blocks
        disturb(monkeypatch)
        assert_equal(run(model, INPUTS["one row"], new=13), expected)


@by_setting
def beams_and_forks(backend):
    with scout_hf.patch(one_llama(), **LOSSY, **backend):
        return beams_and_forks_of(one_llama())


def beams_and_forks_of(model):
    beams = run(model, left_padded(0, 9, tokens=53), new=9, num_beams=3)
    cache = run(model, prompt(), new=4).past_key_values
    twin = cache.fork()
    longer = torch.cat([prompt(), prompt(1, 20, seed=5)], dim=1)
    return (
        logits(beams),
        logits(run(model, longer, past_key_values=twin)),
        logits(run(model, longer[:, :-3], past_key_values=cache)),
    )


@DISTURBED
def test_not_one_logit_changes_with_beams_and_forks(monkeypatch, backend, disturb):
    """Shared pages, copies before writing and recycled pages."""
    expected = beams_and_forks(backend)
    with scout_hf.patch(one_llama(), **LOSSY, **backend):
        disturb(monkeypatch)
        for got, before in zip(beams_and_forks_of(one_llama()), expected):
            assert torch.equal(got, before)


@NATIVE
def test_not_waiting_for_a_job_is_seen(monkeypatch):
    """Negative control of the delays, and of the NaN in what a job is to fill."""
    model = llama()
    with scout_hf.patch(model, **LOSSY, **NATIVELY):
        expected = run(model, prompt(), new=3)
        delayed_jobs(monkeypatch)
        spoiled_buffers(monkeypatch)
        assert_equal(run(model, prompt(), new=3), expected)
        monkeypatch.setattr(
            "scout_hf.kernels.cpu.pool.PoolTicket.wait", lambda ticket: ticket._result and ticket._result()
        )
        got = run(model, prompt(), new=3)
    assert not torch.equal(logits(got), logits(expected))


@pytest.mark.parametrize("settings", [ONE_TIER, TWO_TIERS, INT8 | {"budget": None, "block_size": 8}])
def test_a_turn_for_which_there_is_no_memory_can_be_taken_again(monkeypatch, settings):
    model, first, longer = llama(), prompt(tokens=40), prompt(tokens=640)
    longer[:, :40] = first
    with scout_hf.patch(model, **settings) as handle:
        cache, other = handle.new_cache(), handle.new_cache()
        for each in (cache, other):
            run(model, first, new=1, past_key_values=each)
        length = cache.get_seq_length()
        with monkeypatch.context() as patched:
            patched.setattr(memory, "torch", SimpleNamespace(empty=no_memory))
            patched.setattr(memory.mmap, "mmap", no_memory)
            with pytest.raises(
                scout_hf.errors.HostMemoryError, match="no host memory for .* scout_hf holds .* try|use"
            ):
                run(model, longer, new=4, past_key_values=cache)
        assert cache.get_seq_length() == length
        assert_equal(run(model, longer, past_key_values=cache), run(model, longer, past_key_values=other))


def no_memory(*given, **options):
    """What mmap raises."""
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize("options", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])
def test_a_hook_of_a_user_that_raises_after_the_pass_leaves_the_cache_as_stock_does(options):
    """The tokens are stored by then, in a DynamicCache too: a caller that catches the error continues after them."""
    model, ids = llama(), prompt(2, 30)

    def story(cache):
        found = []
        for tokens in (slice(0, 20), slice(20, 21), slice(21, 26)):
            hook = model.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError), torch.no_grad():
                model(ids[:, tokens], **{CACHE: cache})
            hook.remove()
            found.append([layer.get_seq_length() for layer in cache.layers])
            with torch.no_grad():
                found.append(model(ids[:, 26:27], **{CACHE: cache}).logits)
        return found

    expected = story(DynamicCache(config=model.config))
    with scout_hf.patch(model, **options) as handle:
        found = story(handle.new_cache())
    assert found[::2] == expected[::2] == [[20] * 3, [22] * 3, [28] * 3]
    assert all((one - other).abs().max() <= TOLERANCE for one, other in zip(found[1::2], expected[1::2]))


LATE = """
import sys, threading, warnings
import torch
import scout_hf
from tests.integration.common import TWO_TIERS, llama, prompt, run

warnings.simplefilter("error")
model, inputs = llama(), prompt(1, 100)
expected = run(model, inputs, new=20).sequences
handles = []
for backend in sys.argv[1:]:
    model = llama()
    handles.append(scout_hf.patch(model, **(TWO_TIERS | {"cpu_backend": backend, "monitor": 0.5})))
    run(model, inputs, new=20)
    assert not handles[-1].stats().fidelity.skipped

def work():
    threading.main_thread().join()
    for handle in handles:
        assert torch.equal(run(handle.model, inputs, new=20).sequences, expected)
        print(handle.stats().cpu_ratio > 0, handle.stats().fidelity.skipped)

threading.Thread(target=work).start()
"""


def test_a_thread_that_generates_after_the_main_thread_has_ended():
    """Its jobs run, its samples are skipped, without a word, by either backend."""
    backends = ["torch", *(["native"] if ISAS else [])]
    command = [sys.executable, "-c", LATE, *backends]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    said = done.stdout, but_for_torchao(done.stderr), done.returncode
    assert said == ("True 57\n" * len(backends), "", 0)


@pytest.mark.parametrize("number", [1, 2])
def test_a_thread_that_does_not_start_fails_one_generation_and_no_other(monkeypatch, number):
    model = llama()
    with scout_hf.patch(model, **TWO_TIERS, **TORCH, threads=1) as handle:
        refuse_thread(monkeypatch, number)
        with pytest.raises(scout_hf.errors.ThreadStartError):
            run(model, prompt())
        got = run(model, prompt())
        handle.remove()
        assert_close(got, run(model, prompt()))


# -- resident slots ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"budget": 10**9, "resident": None}, {"resident": 10**9}])
@pytest.mark.parametrize("padding", [(0,), (0, 13)])
def test_a_number_above_any_context_keeps_everything_resident_and_takes_no_more_memory(monkeypatch, setting, padding):
    """Slots grow with the context, and no block is ever left to the CPU."""
    monkeypatch.setattr("scout_hf.methods.scout.policy.SPARE_BLOCKS", 1)
    model = llama()
    expected = run(model, left_padded(*padding), new=80)
    with scout_hf.patch(model, **(TWO_TIERS | {"layer_ahead": True, "cpu_query": "real"} | setting)) as handle:
        got = run(model, left_padded(*padding), new=80)
        assert_close(got, expected)
        for layer in got.past_key_values.scout_layers:
            method = layer.method
            assert method.kv.host.blocks < method.resident.slots <= 1.25 * method.kv.host.blocks + 1
        assert handle.stats().cpu_ratio == 0


def test_slots_that_grow_change_nothing(monkeypatch):
    """As if all that the setting allows had been there from the start."""
    model, options = llama(), LOSSY | {"resident": 96, "budget": 32}
    with scout_hf.patch(model, **options):
        expected = run(model, left_padded(0, 13), new=80)
        expected_slots = expected.past_key_values.scout_layers[0].method.resident.slots
        monkeypatch.setattr("scout_hf.methods.scout.policy.SPARE_BLOCKS", 1)
        got = run(model, left_padded(0, 13), new=80)
    assert got.past_key_values.scout_layers[0].method.resident.slots == expected_slots == 12
    assert_close(got, expected)


@pytest.mark.parametrize("when", ["at first", "as they grow"])
def test_residents_without_memory_name_the_setting(monkeypatch, when):
    from scout_hf.stores import resident_slots

    model = llama()
    monkeypatch.setattr("scout_hf.methods.scout.policy.SPARE_BLOCKS", 1)

    def none(*args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    with scout_hf.patch(model, **(TWO_TIERS | {"resident": 1000})) as handle:
        cache = handle.new_cache()
        with monkeypatch.context() as short:
            if when == "at first":
                short.setattr(resident_slots.ResidentSlots, "__init__", none)
            else:
                short.setattr(resident_slots.ResidentSlots, "grow", none)
            with pytest.raises(scout_hf.errors.ResidentMemoryError, match="bytes.*resident=1000.*budget=None.*smaller"):
                run(model, prompt(), new=40, past_key_values=cache)
        got = run(model, prompt(), new=40)
    assert_close(got, run(model, prompt(), new=40))
