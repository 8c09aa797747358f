"""Parts of a study: all that was measured at one setting, and one factor at a time around the centre."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from scout_hf.eval.fidelity.cells import FULL, MODES, budget_name
from scout_hf.eval.fidelity.grid import BLOCK, BUDGET, TOKENS
from scout_hf.eval.fidelity.summary import Row, find

CENTRE = {"tokens": TOKENS, "block_size": BLOCK, "budget": BUDGET, "stress": "none"}
AXES = {"budget": "budget", "block_size": "block", "tokens": "context", "stress": "stress"}
"""Factors that are varied, and how they are called."""


def settings(table: Sequence[Row]) -> list[dict[str, Any]]:
    """Every (tokens, block_size, budget, stress) with sparse rows, the centre first."""
    found = [{name: row.setting[name] for name in CENTRE} for row in table if row.setting["mode"] != FULL]
    unique = [one for index, one in enumerate(found) if one not in found[:index]]
    return sorted(unique, key=lambda one: one != CENTRE)


def full_at(table: Sequence[Row], setting: dict[str, Any]) -> Row | None:
    """Full attention on the same documents."""
    return find(table, mode=FULL, tokens=setting["tokens"], stress=setting["stress"])


def rows_at(table: Sequence[Row], setting: dict[str, Any]) -> list[Row]:
    """Sparse rows of a setting by digest, the oracle first and blind controls last, then by mode."""
    found = [row for row in table if row.setting["mode"] != FULL and setting.items() <= row.setting.items()]
    names = digests(found)
    modes = list(MODES)
    return sorted(found, key=lambda row: (names.index(row.setting["digest"]), modes.index(row.setting["mode"])))


def digests(table: Sequence[Row]) -> list[str]:
    """Digests of a table: the oracle, min/max, others by name, blind controls."""
    rank = {"oracle": 0, "minmax": 1, "random": 3, "recent": 3}
    names = {row.setting["digest"] for row in table if row.setting["digest"] is not None}
    return sorted(names, key=lambda name: (rank.get(name, 2), name))


def values_of(table: Sequence[Row], axis: str) -> list[Any]:
    """Values of a factor that were measured with all others at the centre; shares of a budget before tokens."""
    others = {name: value for name, value in CENTRE.items() if name != axis}
    found = {
        row.setting[axis] for row in table if row.setting["mode"] != FULL and others.items() <= row.setting.items()
    }
    return sorted(found, key=lambda value: (value != "none", str(value)) if axis == "stress" else (value > 1, value))


def along(table: Sequence[Row], axis: str, digest: str, mode: str) -> Iterator[tuple[Any, Row]]:
    """Values of a factor and the rows there, all others at the centre."""
    for value in values_of(table, axis):
        row = find(table, **(CENTRE | {axis: value}), digest=digest, mode=mode)
        if row is not None:
            yield value, row


def axis_name(axis: str, value: Any) -> str:
    """A value of a factor for people."""
    if axis == "budget":
        return budget_name(value)
    if axis == "tokens":
        return f"{value // 1024}k" if value % 1024 == 0 else str(value)
    return str(value)
