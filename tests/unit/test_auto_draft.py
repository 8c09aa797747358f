"""How many tokens are drafted before an exact pass, on machines whose times are numbers."""

import random

import pytest

from scout_hf.auto_draft import FIRST, MEASURED, SPENT, AutoDraft


class Machine:
    """Passes take so many seconds; each draft is right with a probability of its own."""

    def __init__(self, exact=1.0, draft=0.05, each=0.0, right=0.9, most=16, seed=0):
        self.exact, self.draft, self.each, self.right, self.most = exact, draft, each, right, most
        self.pace, self.seconds, self.tokens = AutoDraft(), 0.0, 0
        self.lengths, self.random = [], random.Random(seed)

    def round_seconds(self, drafts):
        return drafts * self.draft + self.exact + drafts * self.each

    def go(self, tokens):
        """Generate so many tokens; how many per second."""
        begun, first = self.seconds, self.tokens
        while self.tokens < first + tokens:
            drafts = self.pace.length(self.most)
            self.lengths.append(drafts)
            if not drafts:
                self.pace.exact_step(self.exact)
                self.seconds, self.tokens = self.seconds + self.exact, self.tokens + 1
                continue
            right = next((n for n in range(drafts) if self.random.random() > self.right), drafts)
            self.pace.round(drafts, drafts * self.draft, self.exact + drafts * self.each)
            self.pace.judged(right, int(right < drafts))
            self.seconds, self.tokens = self.seconds + self.round_seconds(drafts), self.tokens + right + 1
        return (self.tokens - first) / (self.seconds - begun)

    def best(self):
        """Tokens per second of the best fixed number of drafts."""

        def expected(drafts):
            return sum(self.right**n for n in range(drafts + 1)) / self.round_seconds(drafts)

        return max(1 / self.exact, *(expected(drafts) for drafts in range(1, self.most + 1)))


def test_exact_steps_are_measured_first_and_then_drafts():
    machine = Machine()
    machine.go(40)
    assert machine.lengths[: MEASURED + 1] == [0] * (MEASURED + 1)
    assert machine.lengths[MEASURED + 1 : 2 * MEASURED + 2] == [FIRST] * (MEASURED + 1)


def test_until_it_has_decided_it_says_what_is_timed_and_what_is_not():
    machine = Machine(exact=1.8, draft=0.0123, each=0.01, right=1.0)
    told = [machine.pace.in_words()]
    while machine.pace.measuring:
        machine.go(1)
        told.append(machine.pace.in_words())
    assert told[0] == told[1] == "none yet: exact steps are timed first"
    unknown = "an exact step takes 1800 ms; no draft is timed yet, so how many pay is not known"
    assert told[2] == told[MEASURED + 1] == told[MEASURED + 2] == unknown
    times = "an exact step takes 1800 ms, a draft 12.3 ms, the check of 4 drafts 1840 ms"
    assert told[MEASURED + 3] == f"{times}; how many pay is decided after 3 rounds, 2 so far"
    assert told[-1] == f"up to 8 per exact pass: {times.replace('4 drafts 1840', '8 drafts 1880')}; " + (
        f"{machine.pace.acceptance:.0%} of drafts are expected to be right"
    )


@pytest.mark.parametrize("right", [0.2, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("draft", [0.02, 0.2, 0.6, 0.95])
@pytest.mark.parametrize("each", [0.0, 0.1, 0.5])
def test_near_the_best_number_of_drafts(right, draft, each):
    """Over machines; what it learns and tries costs a few percent."""
    machine = Machine(draft=draft, each=each, right=right)
    machine.go(300)
    assert machine.go(4000) >= machine.best() * 0.88


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
def test_where_a_draft_is_as_dear_as_an_exact_step_it_switches_off_and_says_so(right):
    machine = Machine(draft=1.0, each=0.3, right=right)
    machine.go(2000)
    assert machine.tokens / machine.seconds >= 1 / machine.exact * (1 - 1.5 * SPENT) and not machine.pace.pays
    assert "off, as they do not pay" in machine.pace.in_words()


def test_it_switches_on_again_where_exact_steps_have_become_slow():
    machine = Machine(draft=1.0, right=0.9)
    machine.go(500)
    assert not machine.pace.pays
    machine.exact = 20.0
    machine.go(2000)
    assert machine.pace.pays and machine.go(1000) >= machine.best() * 0.85
    assert f"up to {machine.lengths[-1]} per exact pass" in machine.pace.in_words()


def test_it_switches_off_where_a_text_is_not_foreseen_any_more():
    machine = Machine(draft=0.3, each=0.1, right=0.9)
    machine.go(500)
    assert machine.pace.pays
    machine.right = 0.0
    machine.go(1000)
    assert not machine.pace.pays and machine.go(2000) >= 1 - 2 * SPENT


def test_never_more_than_asked_for_and_none_without_room():
    machine = Machine(right=1.0, most=3)
    machine.go(300)
    assert max(machine.lengths) == 3 and machine.pace.length(0) == machine.pace.length(-1) == 0
    assert machine.pace.length(1) == 1


def test_the_acceptance_is_that_of_the_newest_drafts():
    pace = AutoDraft()
    for right in [4] * 200 + [0] * 200:
        pace.judged(right, int(right < 4))
        assert 0.0 < pace.acceptance <= 1.0
    assert pace.acceptance < 0.02


def test_what_the_end_of_a_call_cuts_short_is_not_told_as_chosen():
    machine = Machine()
    machine.go(400)
    told = machine.pace.in_words()
    assert machine.pace.length(1) == 1 and machine.pace.in_words() == told
