"""Where ``budget="auto"`` turns from exact to sparse steps, on a clock of the test's own."""

import pytest

from scout_hf import auto_budget
from scout_hf.auto_budget import EXACT, LEAST, MEASURED, SPARSE, TIMING, TRYING, AutoBudget, Rates


class Machine:
    """A machine whose step takes ``rest`` seconds and so many per token that is read or scored."""

    def __init__(self, monkeypatch, rest=0.05, token=1e-6, sparse_token=1e-6, score=0.08e-6):
        self.rest, self.token, self.sparse_token, self.score = rest, token, sparse_token, score
        self.now, self.auto, self.rates = 0.0, AutoBudget(), Rates()
        monkeypatch.setattr(auto_budget.time, "perf_counter", lambda: self.now)

    def exact_seconds(self, tokens):
        return self.rest + tokens * self.token

    def sparse_seconds(self, tokens):
        return self.rest + 2048 * self.sparse_token + tokens * self.score

    def step(self, tokens, slow=1.0):
        """One step; whether it was exact, and what it took."""
        exact = self.auto.attends_all(tokens, self.rates)
        self.auto.begin()
        attention = (self.exact_seconds(tokens) if exact else self.sparse_seconds(tokens)) - self.rest
        self.now += (self.rest + attention) * slow
        self.auto.attended(attention * slow)
        self.auto.end(tokens, exact, self.rates, self.auto.took())
        return exact, self.rest + attention

    def at(self, tokens, steps=2 * MEASURED + 2):
        """The kind of step it settles on."""
        return [self.step(tokens)[0] for _ in range(steps)][-1]


def test_short_contexts_are_exact_whatever_it_measures(monkeypatch):
    machine = Machine(monkeypatch, rest=1e-6, token=1.0)
    assert all(machine.step(tokens)[0] for tokens in range(1, LEAST, 57))
    assert machine.auto.sparse_from is None


@pytest.mark.parametrize("rest", [0.001, 0.02, 0.3])
@pytest.mark.parametrize("token", [0.2e-6, 2e-6, 20e-6])
@pytest.mark.parametrize("score", [0.0, 0.08, 0.5, 1.2])
def test_never_slower_than_the_better_kind_by_more_than_a_tenth(monkeypatch, rest, token, score):
    """Over machines and contexts, once it has measured."""
    machine = Machine(monkeypatch, rest, token, token, score * token)
    for tokens in (4000, 5000, 9000, 16000, 33000, 66000, 131000, 400000):
        machine.at(tokens)
        _, took = machine.step(tokens)
        best = min(machine.exact_seconds(tokens), machine.sparse_seconds(tokens))
        assert took <= best * 1.1 + 1e-9, (tokens, took / best)


def test_a_growing_context_turns_once(monkeypatch):
    machine = Machine(monkeypatch, rest=0.05, token=2e-6)
    kinds = [machine.step(tokens)[0] for tokens in range(1000, 40000, 100)]
    turn = kinds.index(False)
    assert all(kinds[:turn]) and not any(kinds[turn:])
    assert machine.auto.sparse_from == 1000 + 100 * turn > LEAST
    assert 0.06 < machine.auto.saving < 0.12
    begun = f"auto: 2048 tokens per step from a context of {machine.auto.sparse_from} tokens on, exact before; "
    assert machine.auto.in_words().startswith(begun)


def test_steps_that_another_program_slows_down_turn_nothing(monkeypatch):
    """Attention and weights are slowed down alike."""
    machine = Machine(monkeypatch, rest=0.05, token=1e-6)
    kinds = [machine.step(5000 + number, slow=3.0 if number % 7 == 0 else 1.0)[0] for number in range(200)]
    assert all(kinds)


def test_a_first_prompt_beyond_it_is_measured_first(monkeypatch):
    machine = Machine(monkeypatch, rest=0.01, token=2e-6)
    kinds = [machine.step(100_000 + number)[0] for number in range(16)]
    assert kinds == [True] * (MEASURED + 1) + [False] * 10
    again = Machine(monkeypatch, rest=0.01, token=2e-6)
    again.rates = machine.rates  # of the same patched model
    assert again.step(100_000)[0] is False


def test_it_says_what_was_timed_and_what_was_not(monkeypatch):
    machine, told = Machine(monkeypatch, rest=1.7, token=1e-6), {}

    def steps(tokens, most=30):
        for _ in range(most):
            before = machine.auto.decided
            machine.step(tokens)
            if machine.auto.decided != before:
                told[machine.auto.decided] = machine.auto.in_words()

    steps(1000, 1)
    assert not told, "nothing to say of a short context"
    steps(100_000)
    assert told == {
        TIMING: "auto: decode steps are exact; sparse ones are considered once 5 exact ones are timed",
        EXACT: "auto: decode steps are exact, as sparse ones gain too little: at 100000 tokens an exact step "
        "takes 1800 ms and a sparse one should take about 1712 ms (not timed yet)",
    }
    steps(1_000_000)
    begun = (
        "auto: 2048 tokens per step from a context of 1000000 tokens on, exact before; at 1000000 tokens an exact step"
    )
    assert told[TRYING] == f"{begun} takes 2700 ms and a sparse one should take about 1802 ms (not timed yet)"
    assert told[SPARSE] == f"{begun} takes 2700 ms and a sparse one 1782 ms"


def test_sparse_steps_that_gain_nothing_are_given_up_for_a_while(monkeypatch):
    machine = Machine(monkeypatch, rest=0.001, token=1e-6, score=2e-6)
    kinds = [machine.step(20_000 + number)[0] for number in range(2000)]
    assert kinds.count(False) <= MEASURED + 1 and machine.auto.sparse_from is None
    told = machine.auto.in_words()
    assert f"sparse ones, {kinds.count(False)} so far" in told and f"{20_000 + kinds.index(False)} tokens" in told


def test_a_cache_that_is_cropped_is_exact_again(monkeypatch):
    machine = Machine(monkeypatch, rest=0.01, token=2e-6)
    assert machine.at(50_000) is False
    assert machine.at(2000) is True and machine.auto.sparse_from is None
    assert machine.auto.in_words() == f"auto: decode steps are exact up to a context of {LEAST} tokens"
    assert machine.at(50_000, steps=1) is False
