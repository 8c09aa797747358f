"""The methods beside scout: alone and in company, disturbed, interrupted, on two threads, sparse in every mode."""

import ctypes
import functools
import threading
import time

import pytest
import torch
from transformers import DynamicCache

import scout_hf
from scout_hf.fusion import Partial
from scout_hf.kernels.cpu import pool, workers
from scout_hf.methods import base, host_to_device
from scout_hf.methods.scout.one_tier import OneTierScout
from scout_hf.stores.staging import Staging
from tests.integration.common import (
    EXACT_METHODS,
    MODES,
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
    INT8,
    Planted,
    delayed_jobs,
    interrupt_a_wait,
    raise_once,
    spoiled_scratch,
)
from tests.patches.tiny import missing, tiny_model

SPARSE = {
    "infinigen": {"method": "infinigen", "budget": 40, "block_size": 8, "window": 8},
    "infinigen, a share": {"method": "infinigen", "budget": 0.4, "block_size": 8, "method_options": {"alpha": None}},
    "infinigen, kept": {"method": "infinigen", "budget": 0.4, "block_size": 8, "method_options": {"keep": True}},
    "hgca": {"method": "hgca", "budget": 32, "block_size": 8, "method_options": {"least": 2}},
    "hgca, a share": {"method": "hgca", "budget": 0.5, "block_size": 8, "resident": 8},
    "hgca, its threshold": {"method": "hgca", "budget": None, "resident": 16, "block_size": 8},
}
ALL = EXACT_METHODS | SPARSE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.thin(3)
def test_every_mode_runs_sparsely(name, mode):
    inputs, options = MODES[mode]
    model = llama()
    with scout_hf.patch(model, **SPARSE[name]) as handle:
        torch.manual_seed(0)
        assert not torch.isnan(logits(run(model, inputs, **options))).any()
        stats = handle.stats()
        assert not stats.exact and 0 < stats.attended_tokens <= stats.context_tokens


@pytest.mark.parametrize("name", ALL)
def test_a_padded_row_is_as_if_alone(name):
    """Whole blocks of padding, so that the row's own blocks lie alike."""
    model, padding = llama(), (0, 8, 40)
    batch = left_padded(*padding, tokens=96)
    with scout_hf.patch(model, **ALL[name]):
        together = logits(run(model, batch, new=20))
        for row, skipped in enumerate(padding):
            alone = logits(run(model, batch["input_ids"][row : row + 1, skipped:], new=20))
            assert (together[:, row] - alone[:, 0]).abs().max() <= 3e-6


def test_a_budget_bounds_what_is_attended():
    model = llama()
    for name, most in (("infinigen", 40), ("hgca", 32)):
        with scout_hf.patch(model, **SPARSE[name]) as handle:
            run(model, prompt(2, 120), new=30)
            # The block that is being filled comes on top.
            assert most / 2 <= handle.stats().attended_tokens <= most + 8, name


def spoiled_staging(monkeypatch):
    """What comes from the host lands in NaN, and what was used becomes NaN."""
    take, give_back = Staging.take, Staging.give_back

    def spoiled(self, *args):
        return take(self, *args).fill_(torch.nan)

    def spoiled_back(self, taken):
        taken.fill_(torch.nan)
        give_back(self, taken)

    monkeypatch.setattr(Staging, "take", spoiled)
    monkeypatch.setattr(Staging, "give_back", spoiled_back)


DISTURBED = [
    *(each for each in DISTURBANCES if each[0] is not INT8 and each[1] is not spoiled_scratch),
    *((backend, spoiled_staging) for backend in ({"cpu_backend": "torch"}, {"cpu_backend": "auto"})),
]


INPUTS = {"one row": prompt(tokens=53), "padded": left_padded(0, 13, tokens=53)}
"""Three tokens before a block is full."""


@functools.cache
def undisturbed(name, backend, inputs):
    with scout_hf.patch(one_llama(), **ALL[name], cpu_backend=backend):
        return without_cache(run(one_llama(), INPUTS[inputs], new=8))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("backend", "disturb"), DISTURBED)
@pytest.mark.thin(3)
def test_not_one_logit_changes(monkeypatch, backend, disturb, name, inputs):
    model, expected = one_llama(), undisturbed(name, backend["cpu_backend"], inputs)
    with scout_hf.patch(model, **ALL[name], **backend):
        disturb(monkeypatch)
        for _ in range(2):
            assert_equal(run(model, INPUTS[inputs], new=8), expected)


def late_by(monkeypatch, seconds):
    """Every job of a pool or thread begins so much later."""
    submit, native = workers.Workers.submit, pool.NativePool.submit

    def later(self, job, *args):
        return submit(self, lambda *args: (time.sleep(seconds), job(*args))[1], *args)

    def native_later(self, entry, args, keep=(), **options):
        word = ctypes.c_uint64(0)
        flag = {"flag": ctypes.addressof(word), "value": 1}
        ticket = native(self, entry, args, keep=(keep, word), **options, **flag)
        threading.Timer(seconds, setattr, (word, "value", 1)).start()
        return ticket

    monkeypatch.setattr(workers.Workers, "submit", later)
    monkeypatch.setattr(pool.NativePool, "submit", native_later)


@pytest.mark.parametrize("name", ["dense", "infinigen"])
def test_not_waiting_for_a_copy_is_seen(monkeypatch, name):
    model = llama()
    with scout_hf.patch(model, **ALL[name]):
        expected = run(model, prompt(), new=6)
        spoiled_staging(monkeypatch)
        late_by(monkeypatch, 0.2)
        monkeypatch.setattr(host_to_device.InFlightCopy, "wait", lambda self: (self._buffer[0], self._buffer[1]))
        assert not torch.equal(logits(run(model, prompt(), new=6)), logits(expected))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("after", [0, 1, 10])
@pytest.mark.thin(3)
def test_going_on_with_the_cache_of_a_forward_that_raised(monkeypatch, name, after):
    model = llama()
    with scout_hf.patch(model, **ALL[name]) as handle:
        expected = run(model, prompt(), new=14)
        raise_once(monkeypatch, model.model.layers[2].mlp, after)
        cache = handle.new_cache()
        with pytest.raises(Planted):
            run(model, prompt(), new=14, past_key_values=cache)
        length = 50 + after - 1 if after else 0
        assert [layer.get_seq_length() for layer in cache.layers] == [length] * 3
        got = run(model, expected.sequences[:, : 50 + after], new=14 - after, past_key_values=cache)
    if name in EXACT_METHODS:
        assert (logits(got) - logits(expected)[after:]).abs().max() <= 3e-6
    assert cache.staging.used_bytes < 1 << 20


@pytest.mark.parametrize("name", EXACT_METHODS)
@pytest.mark.parametrize("call", [0, 2])
def test_an_interrupt_while_waiting(monkeypatch, name, call):
    model, ids = llama(), prompt(1, 60)

    expected = run(model, ids, new=8)
    with scout_hf.patch(model, **EXACT_METHODS[name]) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(ids[:, :59], past_key_values=cache)
        delayed_jobs(monkeypatch)
        waited = interrupt_a_wait(monkeypatch, call)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 59:], past_key_values=cache)
        assert cache.get_seq_length() == 59 and len(waited) == call + 1
        for each in (cache.fork(), cache):
            assert_close(run(model, ids, new=8, past_key_values=each), expected)


@pytest.mark.parametrize("name", ALL)
def test_two_threads_with_one_patched_model(name):
    model = llama()
    inputs = [prompt(1, 60, seed=seed) for seed in range(4)]
    with scout_hf.patch(model, **ALL[name]):
        expected = [run(model, ids, new=10) for ids in inputs]
        found = [None] * len(inputs)

        def go(which):
            for number in range(which, len(inputs), 2):
                found[number] = run(model, inputs[number], new=10)

        threads = [threading.Thread(target=go, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for got, before in zip(found, expected):
        assert_equal(got, before)


@pytest.mark.parametrize("name", ["dense", "infinigen", "kvpr"])
def test_an_emulated_link_changes_time_alone(name, emulated):
    model = llama()
    with scout_hf.patch(model, **ALL[name]):
        expected = run(model, prompt(), new=6)
    assert emulated.now == 0
    with scout_hf.patch(model, **ALL[name], link_gbps=0.002) as handle:
        assert_equal(run(model, prompt(), new=6), expected)
        stats = handle.stats()
    # At 2 MB/s, nothing hidden behind other layers: by this clock they take no time.
    crossed = emulated.now * 2e6
    assert stats.recalled_bytes > 0
    assert crossed >= 0.999 * stats.recalled_bytes
    if name != "kvpr":  # it also tries the link out
        assert crossed <= 1.001 * stats.recalled_bytes


def test_kvpr_computes_nothing_again_where_angles_depend_on_the_length():
    """A sequence that outgrows the first length has keys of many lengths, and inputs do not tell which."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}

    def grown():
        return llama(rope_parameters=rope, max_position_embeddings=56)

    expected = run(grown(), prompt(), new=70)
    model = grown()
    with scout_hf.patch(model, **ALL["kvpr"] | {"method_options": {"share": 1.0}}) as handle:
        assert_close(run(model, prompt(), new=70), expected)
        stats = handle.stats()
    assert "rope_type 'dynamic'" in stats.notes[0]


def test_an_emulated_cpu_is_waited_for(emulated):
    model = llama()
    with scout_hf.patch(model, **ALL["hgca"]):
        expected = run(model, prompt(), new=6)
    with scout_hf.patch(model, **ALL["hgca"], cpu_gbps=0.002) as handle:
        assert_equal(run(model, prompt(), new=6), expected)
        # In each of 5 steps 16 tokens beside the window, 2 heads, keys and values of 8 floats, 3 layers.
        assert emulated.now * 2e6 == pytest.approx(handle.stats().steps * 16 * 2 * 2 * 8 * 4 * 3)


FAMILIES = {
    "llama without GQA": ("llama", {"num_key_value_heads": 8}),
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "opt": ("opt", {}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gemma3": ("gemma3", {}),
    "gpt_oss": ("gpt_oss", {}),
}


@functools.cache
def stock_of_a_family(family, mode):
    kind, changes = FAMILIES[family]
    inputs, options = MODES[mode]
    return run(tiny_model(kind, **changes), inputs, **options)


@pytest.mark.parametrize("mode", ["greedy, long", "padded", "beam", "prompt lookup", "prefill in chunks, padded"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EXACT_METHODS)
@pytest.mark.thin(5)
def test_exact_methods_on_other_families(name, family, mode):
    """Rotary and learnt positions, with GQA and without, fused projections, norms of keys, sliding layers, sinks."""
    kind, changes = FAMILIES[family]
    if reason := missing(kind):
        pytest.skip(reason)
    inputs, options = MODES[mode]
    try:
        expected = stock_of_a_family(family, mode)
    except ValueError as error:
        pytest.skip(f"stock cannot: {error}")  # sliding layers and drafts, before transformers 5.14
    model = tiny_model(kind, **changes)
    with scout_hf.patch(model, **EXACT_METHODS[name]) as handle:
        assert_close(run(model, inputs, **options), expected, 5e-6)
        stats = handle.stats()
        assert stats.exact
        if name == "kvpr":
            computed = sum(handle._hooks.counters.sums["recomputed"].values())
            assert computed > 0 and not stats.notes


@pytest.mark.parametrize("changes", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}, {}], ids=str)
@pytest.mark.parametrize("settings", [{"budget": 40}, {"budget": 0.4}, {"budget": 0.4, "layer_ahead": False}], ids=str)
def test_what_infinigen_keeps_on_the_device_need_not_come_again(settings, changes):
    """The same tokens are attended to, and less crosses the link."""
    model, inputs, found, moved = llama(), left_padded(0, 13, tokens=120), [], []
    for keep in (False, True):
        options = {"method_options": {"alpha": 2.0, "keep": keep}, "block_size": 8, "window": 8} | settings
        with scout_hf.patch(model, method="infinigen", **options) as handle:
            torch.manual_seed(0)
            found.append(run(model, inputs, new=20, **changes))
            stats = handle.stats()
            moved.append((stats.recalled_bytes, stats.attended_tokens))
    assert_close(found[1], found[0])
    assert moved[1][0] < 0.8 * moved[0][0] and moved[1][1] == moved[0][1]


@pytest.mark.parametrize("inputs", ["host", "device"])
def test_kvpr_chooses_to_compute_where_the_link_is_slow(inputs):
    """Without GQA and over a slow link most tokens are recomputed, none over a fast one with GQA."""

    def computed(heads, gbps):
        options = {"method": "kvpr", "block_size": 8, "method_options": {"inputs": inputs}, "link_gbps": gbps}
        with scout_hf.patch(llama(num_key_value_heads=heads), **options) as handle:
            run(handle.model, prompt(1, 120), new=4)
            return sum(handle._hooks.counters.sums["recomputed"].values()), handle.stats()

    slow, stats = computed(8, 1e-3)
    assert slow > 0 and not stats.notes
    none, stats = computed(2, 1e-3)
    if inputs == "host":
        assert none == 0 and "no smaller" in stats.notes[0]
        with scout_hf.patch(llama(num_key_value_heads=2), method="dense", block_size=8) as handle:
            run(handle.model, prompt(1, 120), new=4)
            assert handle.stats().kv_bytes == stats.kv_bytes  # no inputs are kept
    else:
        assert none > 0  # what lies on the device needs no link


def test_kvpr_notices_what_it_cannot_make(monkeypatch):
    """Keys that are not what the inputs make: all KV comes over the link, and the note tells why."""
    model = llama(num_key_value_heads=8)
    expected = run(model, prompt(1, 90), new=6)
    with scout_hf.patch(model, **EXACT_METHODS["dense"]) as handle:
        run(model, prompt(1, 90), new=6)
        dense_bytes = handle.stats().kv_bytes
    with scout_hf.patch(model, **EXACT_METHODS["kvpr"]) as handle:
        make = handle._hooks.parts.keys_values
        monkeypatch.setattr(handle._hooks.parts, "keys_values", lambda *given: [part * 1.01 for part in make(*given)])
        assert_close(run(model, prompt(1, 90), new=6), expected)
        (note,) = handle.stats().notes
        assert "differ from the stored ones" in note and note.endswith("(layers 0 to 2)")
        assert handle.stats().kv_bytes == dense_bytes
        assert not handle._hooks.counters.sums["recomputed"]


class Careless(OneTierScout):
    name = "careless"
    gives = None
    keeps = True

    def __init__(self, *args):
        super().__init__(*args)
        if not self.keeps:
            self.kv = None

    def attend(self, step, query):
        return self.gives(query)


@pytest.mark.parametrize(
    ("gives", "told"),
    [
        (lambda query: None, "returned a NoneType; it must return a Partial"),
        (lambda query: query, "returned a Tensor"),
        (lambda query: Partial(query[:, :1], query[:, :1, :, 0]), r"Partial of \(1, 1, 1, 8\)"),
    ],
    ids=["None", "a tensor", "few heads"],
)
def test_the_author_of_a_method_is_told_what_is_wrong(monkeypatch, gives, told):
    monkeypatch.setattr(base._METHODS, "_classes", dict(base._METHODS._classes) | {"careless": Careless})
    monkeypatch.setattr(Careless, "gives", staticmethod(gives))
    model = llama()
    with scout_hf.patch(model, method="careless"), pytest.raises(scout_hf.ScoutError, match=told):
        run(model, prompt(), new=3)
    monkeypatch.setattr(Careless, "keeps", False)
    with scout_hf.patch(model, method="careless"), pytest.raises(scout_hf.ConfigError, match="not set self.kv"):
        run(model, prompt(), new=3)


def test_rates_that_emulate_nothing_are_refused():
    with pytest.raises(scout_hf.ConfigError, match="split='cpu'"):
        scout_hf.ScoutConfig(split="off", link_gbps=1.0)


UNCOVERING = {"one tier": ONE_TIER, "two tiers": TWO_TIERS, **EXACT_METHODS}


@pytest.mark.parametrize("hidden", [slice(0, 20), slice(10, 30)], ids=["left padding", "in the middle"])
@pytest.mark.parametrize("method", UNCOVERING)
def test_a_later_mask_uncovers_what_the_prompts_mask_hid(method, hidden):
    """What is exact keeps every token, also those that nobody was to see when they came."""
    model, ids = llama(), prompt(2, 60)
    mask, places = torch.ones_like(ids), torch.arange(60).expand(2, -1)
    mask[0, hidden] = 0

    def steps(cache):
        with torch.no_grad():
            first = {"attention_mask": mask[:, :50], "position_ids": places[:, :50]}
            model(ids[:, :50], past_key_values=cache, **first)
            found = []
            for at in range(50, 60):
                shown = mask[:, : at + 1] if at < 53 else torch.ones_like(mask[:, : at + 1])
                step = {"attention_mask": shown, "position_ids": places[:, at : at + 1]}
                found.append(model(ids[:, at : at + 1], past_key_values=cache, **step).logits)
        return torch.cat(found, dim=1)

    expected = steps(DynamicCache(config=model.config))
    with scout_hf.patch(model, **UNCOVERING[method]) as handle:
        got = steps(handle.new_cache())
        assert handle.stats().exact
    assert (got - expected).abs().max() <= TOLERANCE
