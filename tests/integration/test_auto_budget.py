"""``budget="auto"``, the default: exact where nothing is gained, sparse beyond, and both say so."""

import pytest
import torch

import scout_hf
from scout_hf import CACHE, ConfigError, ScoutCache, auto_budget
from tests.integration.common import assert_close, left_padded, llama, one_llama, prompt, run

SMALL = {"block_size": 8, "window": 8}
TURN = 150 + auto_budget.MEASURED + 2
"""The first step of a prompt of 150 tokens warms up, the others are measured."""


@pytest.fixture
def small(monkeypatch):
    """Sparse steps of 32 tokens, on a machine where nothing but attention takes time."""
    monkeypatch.setattr(auto_budget, "SPARSE_TOKENS", 32)
    monkeypatch.setattr("scout_hf.config.SPARSE_TOKENS", 32)
    monkeypatch.setattr(auto_budget, "LEAST", 64)
    add = auto_budget.Rates.add

    def on_such_a_machine(rates, attention, rest, tokens, exact):
        add(rates, float(tokens if exact else 32), 0.0, tokens, exact)

    monkeypatch.setattr(auto_budget.Rates, "add", on_such_a_machine)


def test_it_is_the_default_and_short_contexts_are_exact():
    model = one_llama()
    for inputs in (prompt(1, 90), left_padded(0, 13, 40, tokens=90)):
        expected = run(model, inputs)
        with scout_hf.patch(model) as handle:
            assert handle.config.budget == "auto" and not handle.exact
            assert_close(run(model, inputs), expected)
            stats = handle.stats()
            assert stats.exact and stats.steps == 9 and stats.attended_tokens == stats.context_tokens
            assert not any("budget" in note for note in stats.notes)


@pytest.mark.parametrize("inputs", [prompt(1, 150), left_padded(0, 13, 40, tokens=150)], ids=["one row", "padded"])
def test_it_turns_sparse_and_says_since_when(small, inputs):
    model = one_llama()
    with scout_hf.patch(model, **SMALL) as handle:
        cache = handle.new_cache()
        output = run(model, inputs, 12, **{CACHE: cache})
        stats = handle.stats()
        assert not stats.exact and cache.auto.sparse_from == TURN
        assert any(f"from a context of {TURN} tokens on" in note for note in stats.notes)
        assert stats.attended_tokens < stats.context_tokens
        # What the store may keep ends with the last exact step.
        assert cache.log.held(cache.get_seq_length(), cache.guard.changes).exact == TURN - 1
    with scout_hf.patch(model, budget=None, **SMALL):
        exact = run(model, inputs, 12)
    assert torch.equal(output.sequences[:, :TURN], exact.sequences[:, :TURN])
    assert_close_until(output, exact, TURN - 150)


def test_while_it_times_exact_steps_it_says_so(small):
    with scout_hf.patch(one_llama(), **SMALL) as handle:
        run(handle.model, prompt(1, 150), 3)
        stats = handle.stats()
    assert stats.exact and "once 5 exact ones are timed" in stats.notes[0]


def assert_close_until(got, wanted, steps):
    for one, other in zip(got.logits[:steps], wanted.logits[:steps]):
        assert (one - other).abs().max() <= 3e-6


def test_each_cache_and_fork_decides_for_itself(small):
    model, ids = one_llama(), prompt(1, 150)
    with scout_hf.patch(model, **SMALL) as handle, torch.no_grad():
        cache = handle.new_cache()
        run(model, ids, 12, **{CACHE: cache})
        fork = cache.fork()
        fork.crop(-100)
        model(ids[:, :1], **{CACHE: fork})
        assert fork.auto.sparse_from is None and cache.auto.sparse_from == TURN
        other = handle.new_cache(budget=None)
        handle.reset_stats()
        run(model, ids, 12, **{CACHE: other})
        assert handle.stats().exact


@pytest.mark.parametrize("options", [{"split": "cpu"}, {"method": "hgca"}, {"method": "infinigen"}], ids=str)
def test_elsewhere_it_is_the_budget_of_sparse_steps(small, options):
    model, ids = one_llama(), prompt(1, 150)
    options = SMALL | options | {"layer_ahead": False}
    found = []
    for budget in ("auto", 32):
        with scout_hf.patch(model, budget=budget, **options) as handle:
            found.append(torch.stack(run(model, ids).logits))
            assert not handle.stats().exact
    assert torch.equal(*found)


def test_with_mass_and_in_int8(small):
    model, ids = one_llama(), prompt(1, 150)
    with scout_hf.patch(model, mass=0.9, **SMALL) as handle:
        run(model, ids, 12)
        assert not handle.stats().exact
    with scout_hf.patch(model, host_dtype="int8", **SMALL) as handle:
        run(model, prompt(1, 40))
        stats = handle.stats()
        assert not stats.exact and stats.attended_tokens == stats.context_tokens


def test_a_session_of_it(small, tmp_path):
    model, ids = llama(), prompt(1, 150)
    with scout_hf.patch(model, **SMALL) as handle:
        cache = handle.new_cache()
        run(model, ids, 4, **{CACHE: cache})
        cache.save(tmp_path / "kv")
        opened = ScoutCache.load(tmp_path / "kv", model)
        assert opened.scout_config.budget == "auto" and opened.auto.sparse_from is None


@pytest.mark.parametrize("wrong", ["all", "", "Auto"])
def test_other_words_are_refused(wrong):
    with pytest.raises(ConfigError, match="'auto', an int"):
        scout_hf.ScoutConfig(budget=wrong)
