"""How many tokens to draft before the next exact pass, by what was accepted and the times of passes; 0 if none pay."""

from __future__ import annotations

from dataclasses import dataclass, field

from scout_hf.sizes import time_in_words

WORTH = 0.03
"""Drafts must be expected to be faster than exact steps by this share."""

MEASURED = 2
"""Exact steps, and rounds of drafts, that are measured before the first decision, after one more of each."""

FIRST = 4
"""Drafts of the first rounds."""

NEWEST = 0.25
"""Weight of the newest time in a mean."""

MEMORY = 40.0
"""Drafts that the acceptance is a mean of."""

SPENT = 0.02
"""Share of the time that trials may cost while drafts do not pay."""


@dataclass
class AutoDraft:
    """Paces the drafts of one cache.

    A round drafts ``k`` tokens with sparse steps and checks them in one exact pass, which gives 1 to ``k + 1`` tokens.
    If each draft is accepted with probability ``a``, it gives ``1 + a + ... + a**k``. The ``k`` with the most tokens
    per second is taken, 0 if exact steps are faster; then a trial round comes now and then.

    Attributes
    ----------
    drafted, accepted : float
        Drafts that were looked at, and those of them that were right; older ones count less.
    """

    drafted: float = 2.5
    accepted: float = 2.0
    _exact: float | None = None
    _draft: float | None = None
    _check: dict[int, float] = field(default_factory=dict)
    _exact_steps: int = 0
    _rounds: int = 0
    _wait: float = 0.0
    _length: int = FIRST
    _pays: bool = True
    _decided: bool = False

    @property
    def acceptance(self) -> float:
        """The probability that a draft is accepted."""
        return self.accepted / self.drafted

    @property
    def pays(self) -> bool:
        """Whether drafts were worth it when that was last decided."""
        return self._pays

    @property
    def measuring(self) -> bool:
        """Whether nothing was decided yet, for lack of timed steps and rounds."""
        return not self._decided

    def length(self, most: int) -> int:
        """Tokens to draft now, at most ``most``; 0 for an exact step."""
        if self._exact_steps <= MEASURED or most < 1:
            return 0
        if self._rounds <= MEASURED:
            return min(FIRST, most)
        best = self._best(most)
        self._pays, self._decided = best > 0, True
        if best:
            # What the end of a call cut short was not chosen.
            self._length = best if best < most else max(best, self._length)
            return best
        if self._wait > 0:
            return 0
        return min(max(2, self._length // 2), most)

    def exact_step(self, seconds: float) -> None:
        """An exact step of one token took so long."""
        self._exact_steps += 1
        self._wait -= seconds
        if self._exact_steps > 1:  # the first one also makes what later ones use again
            self._exact = _mean(self._exact, seconds)

    def round(self, drafts: int, drafting: float, checking: float) -> None:
        """So many drafts and their check took so long."""
        self._rounds += 1
        if self._rounds > 1:
            self._draft = _mean(self._draft, drafting / drafts)
            self._check[drafts] = _mean(self._check.get(drafts), checking)
            if not self._pays:
                lost = drafting + checking - (self._exact or 0.0)
                self._wait = max(0.0, lost) / SPENT

    def judged(self, right: int, wrong: int) -> None:
        """Of the drafts of a round ``right`` were accepted; ``wrong`` is 1 if the next one was not, else 0."""
        kept = max(0.0, 1.0 - (right + wrong) / MEMORY)
        self.drafted = self.drafted * kept + right + wrong
        self.accepted = self.accepted * kept + right

    def in_words(self) -> str:
        """What was decided last, for reports."""
        if self._exact is None:
            return "none yet: exact steps are timed first"
        known = [f"an exact step takes {time_in_words(self._exact)}"]
        if self._draft is None:
            return f"{known[0]}; no draft is timed yet, so how many pay is not known"
        tried = max(self._check) if self.measuring else self._length
        known += [
            f"a draft {time_in_words(self._draft)}",
            f"the check of {tried} draft{'s' * (tried != 1)} {time_in_words(self._check_of(tried))}",
        ]
        times = ", ".join(known)
        if self.measuring:
            return f"{times}; how many pay is decided after {MEASURED + 1} rounds, {self._rounds} so far"
        times += f"; {self.acceptance:.0%} of drafts are expected to be right"
        if self._pays:
            return f"up to {self._length} per exact pass: {times}"
        return f"off, as they do not pay; every step is exact: {times}"

    def _best(self, most: int) -> int:
        if self._exact is None or self._draft is None:
            return 0
        best, most_per_second = 0, (1.0 + WORTH) / max(self._exact, 1e-9)
        gained = power = 1.0
        # Longer rounds than those known are tried step by step.
        for drafts in range(1, min(most, 2 * max(self._check) if self._check else most) + 1):
            power *= self.acceptance
            gained += power
            per_second = gained / max(drafts * self._draft + self._check_of(drafts), 1e-9)
            if per_second > most_per_second:
                best, most_per_second = drafts, per_second
        return best

    def _check_of(self, drafts: int) -> float:
        """What a check takes, by the two nearest lengths that were measured; an exact step is one without drafts."""
        known = sorted({0: self._exact or 0.0, **self._check}.items(), key=lambda one: abs(one[0] - drafts))
        if len(known) == 1 or known[0][0] == drafts:
            return known[0][1]
        (near, there), (far, other) = known[:2]
        slope = max(0.0, (other - there) / (far - near))
        return max(0.0, there + slope * (drafts - near))


def _mean(before: float | None, newest: float) -> float:
    return newest if before is None else before + NEWEST * (newest - before)
