"""What the same tests did on stock and on patched models, side by side."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

STOCK = "stock"


@dataclass
class Outcome:
    """One test in one arm.

    ``steps`` are decode steps that scout_hf served, ``refused`` models it would not patch, ``record`` is the file with
    what the generate() calls gave.
    """

    outcome: str
    calls: int = 0
    steps: int = 0
    refused: list[str] = field(default_factory=list)
    seconds: float = 0.0
    message: str = ""
    record: str = ""


@dataclass
class Comparison:
    """Of one arm with stock: what passes there and not here, with a listed reason and without."""

    passed_stock: int
    generating: int
    passed: int
    steps: int
    unexpected: dict[str, str]
    listed: dict[str, str]
    unused: list[str]

    @property
    def holds(self) -> bool:
        """Nothing that passes unpatched fails patched, no listed exception is out of date, and the arm did work."""
        return not self.unexpected and not self.unused and (self.steps > 0 or not self.generating)


def read(path: Path) -> dict[str, Outcome]:
    """The outcome of every test that a run wrote down; the last counts, for tests that are run again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line.pop("test"): Outcome(**line) for line in map(json.loads, lines)}


def generating(stock: dict[str, Outcome]) -> list[str]:
    """Tests that pass on stock and call generate(): the ones that a patch can change."""
    return [test for test, outcome in stock.items() if outcome.outcome == "passed" and outcome.calls]


def compare(
    stock: dict[str, Outcome],
    patched: dict[str, Outcome],
    exceptions: dict[str, str],
    differ: Mapping[str, str] = MappingProxyType({}),
) -> Comparison:
    """Hold one arm against stock.

    Parameters
    ----------
    stock, patched : dict
        Outcomes by test id; a test that is missing from ``patched`` did not end there.
    exceptions : dict
        Reasons by a pattern of test ids, for this arm alone.
    differ : Mapping
        How the numbers of a test are others than on stock, by test id; such a test does not pass.
    """
    tests = generating(stock)
    unexpected, listed, used = {}, {}, set()
    for test in tests:
        outcome = patched.get(test, Outcome("missing", message="the process ended before this test did"))
        if outcome.outcome == "passed" and test not in differ:
            continue
        pattern = next((pattern for pattern in exceptions if fnmatch.fnmatchcase(test, pattern)), None)
        if pattern is None:
            unexpected[test] = differ.get(test) or f"{outcome.outcome}: {outcome.message}"
        else:
            used.add(pattern)
            listed[test] = exceptions[pattern]
    reached = [pattern for pattern in exceptions if any(fnmatch.fnmatchcase(test, pattern) for test in tests)]
    return Comparison(
        passed_stock=sum(outcome.outcome == "passed" for outcome in stock.values()),
        generating=len(tests),
        passed=len(tests) - len(unexpected) - len(listed),
        steps=sum(outcome.steps for outcome in patched.values()),
        unexpected=unexpected,
        listed=listed,
        unused=[pattern for pattern in reached if pattern not in used],
    )


def exceptions_for(listed: list[dict[str, str]], split: str) -> dict[str, str]:
    """The reasons that count for a split, from the entries of ``exceptions.json``."""
    return {entry["test"]: entry["reason"] for entry in listed if entry.get("split", split) == split}
