"""``patch(draft=...)`` with ``dense`` and ``kvpr``: sparse steps over host memory, one crossing per check."""

import copy

import pytest
import torch

import scout_hf
from scout_hf import CACHE, ConfigError, ScoutCache
from scout_hf.auto_draft import AutoDraft
from scout_hf.drafting import picks
from scout_hf.methods import dense, host_to_device, offloading
from scout_hf.methods.host_drafts import HostDrafts
from scout_hf.methods.kvpr import kvpr
from scout_hf.step import Role, active_step
from tests.integration.common import assert_close, left_padded, llama, one_llama, prompt, run

SPARSE = {"block_size": 8, "window": 8, "budget": 24}
METHODS = {
    "scout": SPARSE | {"split": "cpu", "resident": 16},
    "dense": SPARSE | {"method": "dense"},
    "dense, head by head": SPARSE | {"method": "dense", "method_options": {"heads": 1}},
    "kvpr": SPARSE | {"method": "kvpr", "method_options": {"share": 0.5}},
}
EXACT = [name for name in METHODS if name != "scout"]
INPUTS = {"one row": prompt(1, 90), "padded": left_padded(0, 13, 40, tokens=90)}
WARM = {"do_sample": True, "temperature": 1.3, "top_k": 20, "repetition_penalty": 1.1}
LINK = {"link_gbps": 0.002}


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """As where drafts always pay."""
    monkeypatch.setattr(AutoDraft, "length", lambda pace, most: max(0, most))


def exact(model, inputs, new=24, **options):
    with scout_hf.patch(model, budget=None, block_size=8, layer_ahead=False):
        return run(model, inputs, new, **options)


def foresee(monkeypatch, sequences, every=4):
    """Drafts that are right but for each fourth position."""
    real = picks.Picks.pick

    def pick(self, ids, logits):
        at = ids.shape[1]
        right = real(self, ids, logits) if at >= sequences.shape[1] else sequences[:, at : at + 1]
        return right if at % every else (right + 1) % 3 + 4

    monkeypatch.setattr(picks.Picks, "pick", pick)


@pytest.mark.parametrize("sampling", [{}, WARM], ids=["greedy", "sampling"])
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("name", METHODS)
def test_over_a_link_the_tokens_are_those_of_exact_decoding(name, inputs, sampling, emulated, monkeypatch):
    model = one_llama()
    monkeypatch.setattr(offloading, "PAST_CHUNK_TOKENS", 16)
    torch.manual_seed(0)
    wanted = exact(model, inputs, **sampling)
    foresee(monkeypatch, wanted.sequences)
    with scout_hf.patch(model, draft=3, **METHODS[name], **LINK) as handle:
        torch.manual_seed(0)
        assert_close(run(model, inputs, 24, **sampling), wanted)
        stats = handle.stats()
    assert stats.exact and 0 < stats.accepted_tokens < stats.drafted_tokens and emulated.now > 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("name", METHODS)
def test_an_error_within_a_check_over_a_link(name, layer, error, emulated, monkeypatch):
    model, inputs = one_llama(), left_padded(0, 13, tokens=90)
    monkeypatch.setattr(offloading, "PAST_CHUNK_TOKENS", 16)
    wanted = exact(model, inputs)
    foresee(monkeypatch, wanted.sequences)
    with scout_hf.patch(model, draft=3, **METHODS[name], **LINK) as handle:
        cache, checks = handle.new_cache(), []

        def fail(*_):
            step = active_step()
            if step is not None and step.role is Role.CHECK:
                checks.append(0)
                if len(checks) == 2:
                    raise error

        hook = model.model.layers[layer].mlp.register_forward_pre_hook(fail)
        with pytest.raises(error):
            run(model, inputs, 24, **{CACHE: cache})
        hook.remove()
        length = cache.get_seq_length()
        assert 90 < length < 113 and torch.equal(cache.token_ids, wanted.sequences[:, :length])
        ids = wanted.sequences[:, : length + 1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - 90), value=1)
        got = run(model, {"input_ids": ids, "attention_mask": mask}, 113 - length, **{CACHE: cache})
    assert torch.equal(got.sequences, wanted.sequences)


@pytest.mark.parametrize("name", EXACT)
def test_keys_and_values_cross_once_per_check_and_never_for_drafts(name, emulated, monkeypatch):
    model, inputs = one_llama(), prompt(1, 200)
    wanted = exact(model, inputs)
    foresee(monkeypatch, wanted.sequences)
    crossed, real = {role: 0 for role in Role}, host_to_device.blocks_to_device

    def counted(step, host, *args):
        copy = real(step, host, *args)
        crossed[step.role] += copy.nbytes
        return copy

    for module in (offloading, kvpr):
        monkeypatch.setattr(module, "blocks_to_device", counted)
    with scout_hf.patch(model, draft=3, **METHODS[name], **LINK) as handle:
        cache = handle.new_cache()
        assert_close(run(model, inputs, 24, **{CACHE: cache}), wanted)
        stats, held = handle.stats(), [layer.method.kv.host for layer in cache.layers]
    all_of_it = sum(2 * host.heads * host.length * host.head_dim * 4 for host in held)
    assert crossed[Role.DRAFT] == 0 and stats.drafted_tokens > 2 * stats.draft_checks
    assert 0.85 * all_of_it * stats.draft_checks < crossed[Role.CHECK] <= all_of_it * stats.draft_checks
    drafted = stats.attended_tokens * stats.steps
    assert drafted < stats.drafted_tokens * 40 + (stats.steps - stats.drafted_tokens) * 225


def codes(cache):
    return [layer.method.drafts.selector.table.codes() for layer in cache.layers]


def assert_in_line(cache):
    """Digests are those of the pages that are there, and of nothing else."""
    for layer in cache.layers:
        method, drafts = layer.method, layer.method.drafts
        assert drafts.selector.blocks <= method.kv.host.blocks
        fresh = HostDrafts(method.config, method.layer_idx, method.kv.host)
        fresh.selector.extend_from(method.kv.host, drafts.selector.blocks, None)
        assert torch.equal(drafts.selector.table.codes(), fresh.selector.table.codes())


@pytest.mark.parametrize("name", ["dense", "kvpr"])
def test_digests_follow_the_cache(name, monkeypatch):
    model, inputs = one_llama(), prompt(3, 90)
    wanted = exact(model, inputs, 60).sequences
    with scout_hf.patch(model, draft=3, **METHODS[name], digest="minmax") as handle:
        cache = handle.new_cache()
        run(model, inputs, 30, **{CACHE: cache})
        assert len(codes(cache)) == 3 and handle.stats().kv_bytes["digests"] > 0
        assert_in_line(cache)
        made = codes(cache)[0].shape[2]
        twin = cache.fork()
        cache.crop(-70)
        assert codes(cache)[0].shape[2] == 6 and codes(twin)[0].shape[2] == made
        for each, length, rows in ((cache, 49, [0, 1, 2]), (twin, 119, [2, 0])):
            each.batch_select_indices(torch.tensor(rows))
            assert_in_line(each)
            got = run(model, wanted[rows, : length + 1], 20, **{CACHE: each})
            assert torch.equal(got.sequences, run(llama(), wanted[rows, : length + 1], 20).sequences)
            assert_in_line(each)
        with pytest.raises(ZeroDivisionError):
            hook = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
            run(model, got.sequences, 4, **{CACHE: twin})
        hook.remove()
        assert_in_line(twin)


def test_digests_are_made_when_they_are_first_wanted(tmp_path):
    """Also of a cache from a file or from outside a pass; a patch without drafts makes none."""
    model, inputs = one_llama(), prompt(1, 90)
    wanted = exact(model, inputs)
    with scout_hf.patch(model, **METHODS["dense"] | {"budget": "auto"}) as handle:
        cache = handle.new_cache()
        run(model, inputs, 2, **{CACHE: cache})
        assert all(layer.method.drafts is None for layer in cache.layers)
        cache.save(tmp_path / "kept")
    with scout_hf.patch(model, draft=3, **METHODS["dense"]) as handle:
        loaded = ScoutCache.load(tmp_path / "kept", model, budget=24)
        outside = handle.new_cache()
        for layer, (keys, values, *_) in enumerate(cache):
            outside.update(keys, values, layer)
        for each in (loaded, outside, copy.deepcopy(loaded)):
            assert torch.equal(run(model, wanted.sequences[:, :92], 22, **{CACHE: each}).sequences, wanted.sequences)
        assert handle.stats().draft_checks


def test_a_prompt_tells_digests_what_queries_are_like():
    model = one_llama()
    with scout_hf.patch(model, draft=3, **METHODS["dense"], digest="sign2") as handle, torch.no_grad():
        cache = handle.new_cache()
        model(prompt(1, 90), **{CACHE: cache})
        for layer in cache.layers:
            assert layer.method.drafts.selector._query_power is not None and not layer.method.drafts.used_bytes


@pytest.mark.parametrize("options", [{"mass": 0.1}, {"budget": 0.2}, {"sinks": 8}, {"dense_layers": 1}])
def test_settings_of_sparse_steps_have_an_effect(options, monkeypatch):
    """They change what drafts attend to, and no token; no warning says otherwise."""
    model, inputs = one_llama(), left_padded(0, 13, tokens=200)
    wanted, attended = exact(model, inputs), []
    foresee(monkeypatch, wanted.sequences)
    usual = {"block_size": 8, "window": 8, "budget": 64, "method": "dense"}
    monkeypatch.setattr("scout_hf.selection.selector.MASS_FLOOR", 8)
    for given in ({}, options):
        with scout_hf.patch(model, draft=3, **usual | given) as handle:
            assert_close(run(model, inputs, 24), wanted)
            attended.append((handle.stats().attended_tokens, handle.stats().drafted_tokens))
    assert "sinks" in options or attended[0] != attended[1], attended


def test_what_drafts_cannot_use_is_still_refused():
    model = llama()
    before = dict(vars(model))
    for options in ({"recall": 0.1}, {"host_dtype": "int8"}, {"mass": 0.9, "digest": "minmax"}):
        with pytest.raises(ConfigError):
            scout_hf.patch(model, draft=True, **METHODS["dense"] | options)
    assert vars(model) == before and dense.Dense.can_draft
