"""cpu_query="auto": predicted queries are used by the CPU where they were seen to do no harm, and only there."""

from __future__ import annotations

import copy

import pytest
import torch

import scout_hf
from scout_hf.fusion import Partial
from scout_hf.methods.scout.query_gate import CHECK_EVERY, QueryGate
from scout_hf.patches import family_of
from tests.integration.common import LOSSY, TWO_TIERS, assert_close, left_padded, llama, logits, prompt, run, spiky
from tests.integration.models import silence

AUTO = {"cpu_query": "auto", "layer_ahead": True}


def partial(scale: float) -> Partial:
    out = torch.ones(1, 4, 1, 8) * scale
    return Partial(out, torch.zeros(1, 4, 1))


def trusts(cache) -> list[QueryGate]:
    return [layer.method.gate for layer in cache.layers]


def count_guesses(monkeypatch) -> list[bool]:
    """What every layer decided in every step, in order."""
    decided, asked = [], QueryGate.in_prediction

    def spy(self, *given):
        decided.append(asked(self, *given))
        return decided[-1]

    monkeypatch.setattr(QueryGate, "in_prediction", spy)
    return decided


@pytest.mark.parametrize("inputs", [prompt(), left_padded(0, 13)], ids=["one row", "padded"])
def test_a_layer_that_is_predicted_badly_attends_with_the_real_query(executor, inputs, monkeypatch):
    model = spiky()
    family = type(family_of(model))
    query = family.query
    # Chooses almost as well where each block has keys on both sides, but attends to the wrong ones.
    monkeypatch.setattr(family, "query", lambda *args, **kwargs: -query(*args, **kwargs))
    with scout_hf.patch(model, **LOSSY | {"cpu_query": "real"}):
        expected = run(model, inputs, new=20)
    with scout_hf.patch(model, **LOSSY) as handle:
        predicted = run(model, inputs, new=20)
    with scout_hf.patch(model, **LOSSY | AUTO) as handle:
        got = run(model, inputs, new=20)
        assert not handle.exact
        errors = [trust.error for trust in trusts(got.past_key_values)]
    assert errors[0] is None and min(errors[1:]) > 0.05
    assert torch.equal(logits(got), logits(expected)) and not torch.equal(logits(predicted), logits(expected))


def test_a_layer_that_is_predicted_well_is_trusted_after_a_look(executor, monkeypatch):
    model = llama()
    silence(model, family_of(model))
    expected = run(model, prompt(), new=2 * CHECK_EVERY + 4)
    decided = count_guesses(monkeypatch)
    with scout_hf.patch(model, **TWO_TIERS | AUTO):
        got = run(model, prompt(), new=2 * CHECK_EVERY + 4)
        assert_close(got, expected)
        assert all(trust.error < 1e-4 for trust in trusts(got.past_key_values)[1:])
    layers = len(got.past_key_values.layers) - 1
    steps = [decided[first : first + layers] for first in range(0, len(decided), layers)]
    assert [any(step) for step in steps] == [bool(index % CHECK_EVERY) for index in range(len(steps))]
    assert len(steps) == 2 * CHECK_EVERY + 3


def test_trust_is_lost_and_won_again():
    trust = QueryGate("auto")
    assert not trust.in_prediction() and trust.checking
    trust.judge(partial(1.0), partial(1.01))
    assert [trust.in_prediction() for _ in range(CHECK_EVERY)] == [True] * (CHECK_EVERY - 1) + [False]
    trust.judge(partial(1.0), partial(2.0))
    assert not trust.in_prediction() and trust.error == pytest.approx(0.505, abs=1e-3)
    twin = trust.fork()
    for _ in range(20):
        twin.judge(partial(1.0), partial(1.0))
    assert twin.in_prediction() and not trust.in_prediction()


def test_a_layer_is_looked_at_as_soon_as_there_is_something_to_see():
    """Steps in which the CPU has no share say nothing, and neither does one that is no number."""
    trust = QueryGate("auto")
    for _ in range(CHECK_EVERY // 2):
        assert not trust.in_prediction() and trust.checking
    trust.judge(partial(1.0), partial(float("nan")))
    assert not trust.in_prediction() and trust.checking and trust.error is None
    trust.judge(partial(1.0), partial(1.0))
    assert trust.in_prediction() and not trust.checking
    trust.judge(partial(1.0), partial(float("inf")))
    assert trust.error == 0


@pytest.mark.parametrize("rule, guesses", [("predicted", True), ("real", False)])
def test_the_other_rules_never_look(rule, guesses):
    trust = QueryGate(rule)
    assert [trust.in_prediction() for _ in range(20)] == [guesses] * 20 and not trust.checking


def test_forks_of_a_cache_keep_what_was_learnt():
    model = llama()
    with scout_hf.patch(model, **LOSSY | AUTO):
        cache = run(model, prompt(), new=4).past_key_values
        twin = copy.deepcopy(cache)
        assert [trust.error for trust in trusts(twin)] == [trust.error for trust in trusts(cache)]
        assert trusts(twin)[1] is not trusts(cache)[1]
