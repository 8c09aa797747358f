"""Cells put together: means over models and tasks, and what selection and prediction cost, over the same questions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from scout_hf.eval.fidelity.cells import FULL, SAME_TIERS, TEXT

SETTING = ("tokens", "block_size", "budget", "digest", "mode", "stress")
Record = dict[str, Any]


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
    records : tuple of dict
        The cells.
    """

    setting: dict[str, Any]
    count: int
    score: Estimate
    lost_to_selection: Estimate | None
    lost_to_prediction: Estimate | None
    attended_share: float
    tokens_per_second: float
    records: tuple[Record, ...]


def rows(records: Iterable[Record], text: bool) -> list[Row]:
    """A row per setting, in the order of first appearance, of the cells that ask questions or of those on text."""
    table: dict[tuple, dict[tuple[str, str], Record]] = {}
    for record in records:
        if (record["task"] == TEXT) == text:
            setting = tuple(record[name] for name in SETTING)
            table.setdefault(setting, {})[record["model"], record["task"]] = record
    return [_row(setting, cells, table, text) for setting, cells in table.items()]


def find(table: Sequence[Row], **fields: Any) -> Row | None:
    """The row with these fields of its setting; None if there is none, ValueError if there are several."""
    found = [row for row in table if all(row.setting[name] == value for name, value in fields.items())]
    if len(found) > 1:
        raise ValueError(f"{len(found)} rows have {fields}; name more of {', '.join(SETTING)}")
    return found[0] if found else None


def _row(setting: tuple, cells: dict, table: dict, text: bool) -> Row:
    fields = dict(zip(SETTING, setting))
    mode, selection, prediction = fields["mode"], None, None
    if mode != FULL:
        full = table.get(_like(fields, mode=FULL, block_size=None, budget=None, digest=None), {})
        real = table.get(_like(fields, mode=SAME_TIERS[mode]), {})
        selection = _lost(full, real, cells, text)
        if mode.startswith("predicted"):
            prediction = _lost(real, cells, cells, text)
    held = list(cells.values())
    return Row(
        fields,
        sum(len(_items(record)) for record in held),
        _perplexity(held) if text else _mean_of([_items(record) for record in held]),
        selection,
        prediction,
        sum(record["attended_share"] for record in held) / len(held),
        sum(record["tokens_per_second"] for record in held) / len(held),
        tuple(held),
    )


def _like(fields: dict[str, Any], **others: Any) -> tuple:
    return tuple((fields | others)[name] for name in SETTING)


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


def _perplexity(records: Sequence[Record]) -> Estimate:
    loss = _mean_of([_items(record) for record in records])
    return Estimate(math.exp(loss.value), math.exp(loss.value) * loss.error)


def _mean_of(groups: Sequence[Sequence[float]]) -> Estimate:
    """The mean of the groups' means; the error takes items as independent within and between groups."""
    means = [sum(group) / len(group) for group in groups]
    square = 0.0
    for group, mean in zip(groups, means):
        if len(group) > 1:
            square += sum((item - mean) ** 2 for item in group) / (len(group) - 1) / len(group)
    return Estimate(sum(means) / len(means), math.sqrt(square) / len(means))
