"""Cells put together: means over models and tasks, what selection and prediction cost, and parts of a study.

Losses are over the same questions. One factor at a time is varied around the centre.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from scout_hf.eval.fidelity.cells import (
    BLOCK,
    BUDGET,
    FULL,
    METHODS,
    MODES,
    SAME_TIERS,
    STRESSES,
    TEXT,
    TOKEN_BUDGET,
    TOKENS,
    budget_name,
)
from scout_hf.eval.tables import by, short

SETTING = ("tokens", "block_size", "budget", "digest", "mode", "stress")
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
Record = dict[str, Any]
Setting = dict[str, Any]


class Estimate(NamedTuple):
    """A mean and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Row:
    """One setting, mean over models and tasks (perplexity: over windows of text).

    Attributes
    ----------
    setting : dict
        The fields of ``SETTING``.
    count : int
        Questions, or windows.
    score : Estimate
        Accuracy; of text, perplexity, its error from the spread of windows.
    lost_to_selection, lost_to_prediction : Estimate or None
        Accuracy lost; of text, the relative growth of perplexity. Selection: full attention less the real query on as
        many tiers. Prediction: the real query on two tiers less this mode; None where nothing is predicted. None where
        the study lacks what to compare with.
    attended_share, tokens_per_second : float
        Means.
    records : list of dict
        The cells.
    """

    setting: Setting
    count: int
    score: Estimate
    lost_to_selection: Estimate | None
    lost_to_prediction: Estimate | None
    attended_share: float
    tokens_per_second: float
    records: list[Record]


def rows(records: Iterable[Record], text: bool) -> list[Row]:
    """A row per setting, in the order of first appearance, of the cells that ask questions or of those on text."""
    part = (record for record in records if (record["task"] == TEXT) == text)
    groups = by(part, lambda record: tuple(record[name] for name in SETTING))
    table = {setting: {(one["model"], one["task"]): one for one in cells} for setting, cells in groups.items()}
    return [_row(dict(zip(SETTING, setting)), cells, table, text) for setting, cells in table.items()]


def find(table: Sequence[Row], **fields: Any) -> Row | None:
    """The row with these fields of its setting; None if there is none, ValueError if there are several."""
    found = [row for row in table if all(row.setting[name] == value for name, value in fields.items())]
    if len(found) > 1:
        raise ValueError(f"{len(found)} rows have {fields}; name more of {', '.join(SETTING)}")
    return found[0] if found else None


def _row(setting: Setting, cells: dict, table: dict, text: bool) -> Row:
    def like(**others: Any) -> dict:
        return table.get(tuple((setting | others)[name] for name in SETTING), {})

    mode, selection, prediction = setting["mode"], None, None
    if mode != FULL:
        real = like(mode=SAME_TIERS[mode])
        selection = _lost(like(mode=FULL, block_size=None, budget=None, digest=None), real, cells, text)
        prediction = _lost(real, cells, cells, text) if mode.startswith("predicted") else None
    held = list(cells.values())
    score = _mean_of([_items(record) for record in held])
    if text:
        score = Estimate(math.exp(score.value), math.exp(score.value) * score.error)
    share, speed = (sum(one[name] for one in held) / len(held) for name in ("attended_share", "tokens_per_second"))
    return Row(setting, sum(len(_items(one)) for one in held), score, selection, prediction, share, speed, held)


def _lost(before: dict, after: dict, cells: dict, text: bool) -> Estimate | None:
    """Mean paired loss from one setting to another over the subjects of ``cells``; None unless both have them all."""
    if any(key not in before or key not in after for key in cells):
        return None
    pairs = [(_items(before[key]), _items(after[key])) for key in cells]
    if any(len(left) != len(right) for left, right in pairs):
        return None
    if text:
        growth = _mean_of([[b - a for a, b in zip(*pair)] for pair in pairs])
        return Estimate(math.expm1(growth.value), math.exp(growth.value) * growth.error)
    return _mean_of([[a - b for a, b in zip(*pair)] for pair in pairs])


def _items(record: Record) -> list[float]:
    """What a cell's figure is the mean of: answers, 1 if right, or losses of windows."""
    return [float(one) for one in record.get("right", record.get("nll"))]


def _mean_of(groups: Sequence[Sequence[float]]) -> Estimate:
    """The mean of the groups' means; the error takes items as independent within and between groups."""
    means = [sum(group) / len(group) for group in groups]
    square = 0.0
    for group, mean in zip(groups, means):
        if len(group) > 1:
            square += sum((item - mean) ** 2 for item in group) / (len(group) - 1) / len(group)
    return Estimate(sum(means) / len(means), math.sqrt(square) / len(means))


# -- parts of a study -----------------------------------------------------------------------------------------------


def settings(table: Sequence[Row]) -> list[Setting]:
    """Every (tokens, block_size, budget, stress) with sparse rows, the centre first."""
    found = {tuple(row.setting[name] for name in CENTRE) for row in table if row.setting["mode"] != FULL}
    return sorted((dict(zip(CENTRE, one)) for one in found), key=lambda one: (one != CENTRE, *map(str, one.values())))


def full_at(table: Sequence[Row], setting: Setting) -> Row | None:
    """Full attention on the same documents."""
    return find(table, mode=FULL, tokens=setting["tokens"], stress=setting["stress"])


def rows_at(table: Sequence[Row], setting: Setting) -> list[Row]:
    """Sparse rows of a setting by digest, the oracle first and blind controls last, then by mode."""
    found = [row for row in table if row.setting["digest"] is not None and setting.items() <= row.setting.items()]
    names, modes = digests(found), list(MODES)
    return sorted(found, key=lambda row: (names.index(row.setting["digest"]), modes.index(row.setting["mode"])))


def methods_at(table: Sequence[Row], setting: Setting) -> list[Row]:
    """Rows of other methods at a setting, in the order of ``METHODS``."""
    found = {row.setting["mode"]: row for row in table if setting.items() <= row.setting.items()}
    return [found[mode] for mode in METHODS if mode in found]


def digests(table: Sequence[Row]) -> list[str]:
    """Digests of a table: the oracle, min/max, others by name, blind controls."""
    rank = {"oracle": 0, "minmax": 1, "random": 3, "recent": 3}
    names = {row.setting["digest"] for row in table if row.setting["digest"] is not None}
    return sorted(names, key=lambda name: (rank.get(name, 2), name))


def points(table: Sequence[Row], axis: str) -> list[tuple[str, Setting]]:
    """Settings along a factor that were measured, with their names; all else is at the centre.

    Rivals that grow with the text only differ in long texts, and stand beside such a text without.
    """
    measured = settings(table)
    if axis == "stress":
        named = [(one, CENTRE | {"stress": one}) for one in STRESSES if CENTRE | {"stress": one} in measured]
        beside = [CENTRE | {"tokens": LONG, "stress": stress} for stress in ("none", "rivals")]
        whole = all(one in measured for one in beside)
        return [*named, *(zip((short(LONG), "more rivals"), beside) if whole else ())]
    varied, centre = ("tokens", CENTRE | {"budget": TOKEN_BUDGET}) if axis == "fixed" else (axis, CENTRE)
    found = [one for one in measured if one == centre | {varied: one[varied]}]
    if axis == "budget":
        found = [one for one in found if isinstance(one["budget"], float)]
    name = {"budget": budget_name, "tokens": short}.get(varied, str)
    return [(name(one[varied]), one) for one in sorted(found, key=lambda one: one[varied])]


def along(table: Sequence[Row], axis: str, digest: str, mode: str) -> dict[str, Row]:
    """The rows of a digest and mode along a factor, by the names of :func:`points`."""
    found = {name: find(table, **setting, digest=digest, mode=mode) for name, setting in points(table, axis)}
    return {name: row for name, row in found.items() if row is not None}
