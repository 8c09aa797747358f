"""Parts of a study: all that was measured at one setting, and one factor at a time around the centre."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scout_hf.eval.fidelity.cells import FULL, METHODS, MODES, STRESSES, budget_name
from scout_hf.eval.fidelity.grid import BLOCK, BUDGET, TOKEN_BUDGET, TOKENS
from scout_hf.eval.fidelity.summary import Row, find

CENTRE = {"tokens": TOKENS, "block_size": BLOCK, "budget": BUDGET, "stress": "none"}
AXES = {
    "budget": "budget",
    "block_size": "block size",
    "tokens": f"context, at {budget_name(BUDGET)}",
    "fixed": f"context, at {TOKEN_BUDGET} tokens",
    "stress": "stress",
}
"""Factors that are varied, and how they are called."""

LONG = 8192


def settings(table: Sequence[Row]) -> list[dict[str, Any]]:
    """Every (tokens, block_size, budget, stress) with sparse rows, the centre first."""
    found = {tuple(row.setting[name] for name in CENTRE) for row in table if row.setting["mode"] != FULL}
    return sorted((dict(zip(CENTRE, one)) for one in found), key=lambda one: (one != CENTRE, *map(str, one.values())))


def full_at(table: Sequence[Row], setting: dict[str, Any]) -> Row | None:
    """Full attention on the same documents."""
    return find(table, mode=FULL, tokens=setting["tokens"], stress=setting["stress"])


def rows_at(table: Sequence[Row], setting: dict[str, Any]) -> list[Row]:
    """Sparse rows of a setting by digest, the oracle first and blind controls last, then by mode."""
    found = [row for row in table if row.setting["digest"] is not None and setting.items() <= row.setting.items()]
    names = digests(found)
    modes = list(MODES)
    return sorted(found, key=lambda row: (names.index(row.setting["digest"]), modes.index(row.setting["mode"])))


def methods_at(table: Sequence[Row], setting: dict[str, Any]) -> list[Row]:
    """Rows of other methods at a setting, in the order of ``METHODS``."""
    found = {row.setting["mode"]: row for row in table if setting.items() <= row.setting.items()}
    return [found[mode] for mode in METHODS if mode in found]


def digests(table: Sequence[Row]) -> list[str]:
    """Digests of a table: the oracle, min/max, others by name, blind controls."""
    rank = {"oracle": 0, "minmax": 1, "random": 3, "recent": 3}
    names = {row.setting["digest"] for row in table if row.setting["digest"] is not None}
    return sorted(names, key=lambda name: (rank.get(name, 2), name))


def points(table: Sequence[Row], axis: str) -> list[tuple[str, dict[str, Any]]]:
    """Settings along a factor that were measured, with their names; all else is at the centre.

    Rivals that grow with the text only differ in long texts, and stand beside such a text without.
    """
    measured = settings(table)
    if axis == "stress":
        found = [CENTRE | {"stress": stress} for stress in STRESSES]
        named = [(one["stress"], one) for one in found if one in measured]
        beside = [CENTRE | {"tokens": LONG, "stress": stress} for stress in ("none", "rivals")]
        if all(one in measured for one in beside):
            named += zip((_name("tokens", LONG), "more rivals"), beside)
        return named
    varied, centre = ("tokens", CENTRE | {"budget": TOKEN_BUDGET}) if axis == "fixed" else (axis, CENTRE)
    found = [one for one in measured if one == centre | {varied: one[varied]}]
    if axis == "budget":
        found = [one for one in found if isinstance(one["budget"], float)]
    return [(_name(varied, one[varied]), one) for one in sorted(found, key=lambda one: one[varied])]


def along(table: Sequence[Row], axis: str, digest: str, mode: str) -> dict[str, Row]:
    """The rows of a digest and mode along a factor, by the names of :func:`points`."""
    found = {name: find(table, **setting, digest=digest, mode=mode) for name, setting in points(table, axis)}
    return {name: row for name, row in found.items() if row is not None}


def _name(axis: str, value: Any) -> str:
    """A value of a factor for people."""
    if axis == "budget":
        return budget_name(value)
    if axis == "tokens":
        return f"{value // 1024}k" if value % 1024 == 0 else str(value)
    return str(value)
