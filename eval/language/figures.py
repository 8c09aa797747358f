"""Means with standard errors over what a study of a language model measured, by setting and task."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from scout_hf import ScoutConfig
from scout_hf.eval.language.facts import RETRIEVAL
from scout_hf.eval.language.tasks import CONTINUATION, RECORDS, REPETITION
from scout_hf.eval.tables import by

TASKS = (*RETRIEVAL, RECORDS, REPETITION, CONTINUATION)
HEADLINE = "retrieval"
"""All tasks of ``RETRIEVAL`` together."""

ALL = "all"

Record = dict[str, Any]


@dataclass(frozen=True)
class Mean:
    """A mean, its standard error, and of how many."""

    value: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Mean:
        """None of nothing is nan."""
        return cls.pooled([(value, 1) for value in values])

    @classmethod
    def pooled(cls, sums: Sequence[tuple[float, int]]) -> Mean:
        """Of parts that each have a sum and a count: all together, with the error from the spread of the parts.

        What is within a part, such as the steps of one answer, is not independent.
        """
        counts = sum(count for _, count in sums)
        if not counts:
            return cls(math.nan, math.nan, 0)
        mean = sum(value for value, _ in sums) / counts
        spread = sum((value - mean * count) ** 2 for value, count in sums)
        parts = len(sums)
        error = math.sqrt(spread * parts / (parts - 1)) / counts if parts > 1 else math.nan
        return cls(mean, error, counts)

    def shown(self, digits: int, sign: str = "") -> str:
        """``-0.12±0.03``; a hyphen for nothing."""
        if not self.n:
            return "-"
        error = "" if math.isnan(self.error) else f"±{self.error:.{digits}f}"
        return f"{self.value:{sign}.{digits}f}{error}"


@dataclass(frozen=True)
class Score:
    """Of one task under one setting, over all documents of a length.

    ``right`` is the share of answers that greedy decoding gives, ``log_prob`` that of a right answer, in nats. Losses
    are full attention's log-probability less this one's, per answer and per token, over pairs. ``divergence`` of the
    next token's distribution from full attention's is over all decode steps; none for full attention.
    """

    right: Mean
    log_prob: Mean
    loss: Mean
    token_log_prob: Mean
    token_loss: Mean
    divergence: Mean


@dataclass(frozen=True)
class Row:
    """One setting at one length: all documents together.

    ``scores`` are by task, of ``retrieval`` together and of ``all``; ``fields`` and ``same`` are the shares of
    generated records that are right, and, of those that full attention wrote, that are the same.
    """

    tokens: int
    setting: Record | None
    scores: dict[str, Score]
    fields: Mean
    same: Mean
    attended: float
    context: float
    seconds: float
    inside: dict[str, float | None]
    layers: list[Record]

    @property
    def label(self) -> str:
        """What differs between settings, in words."""
        return "full attention" if self.setting is None else label(self.setting)

    @property
    def kind(self) -> str:
        """The same, without the budget."""
        return label(self.setting, budget=False)


INSIDE = ("mass", "output_error", "cosine", "cpu_ratio")
_DEFAULTS = dataclasses.asdict(ScoutConfig())
_NAMED = ("budget", "digest", "split", "cpu_query", "monitor", "method")


def label(setting: Record, budget: bool = True) -> str:
    """Such as ``512, sign, two tiers``; other settings as far as they are not the defaults."""
    words = [] if setting["method"] == "scout" else [setting["method"]]
    if budget:
        words.insert(0, "everything" if setting["budget"] is None else str(setting["budget"]))
    if setting["method"] == "scout":
        words.append(setting["digest"])
    if setting["split"] == "cpu":
        query = setting["cpu_query"]
        words.append("two tiers" if query == "auto" else f"two tiers, {query}")
    # A tuple is a list once it was read from a file.
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in setting.items()}
    others = [name for name in given if name not in _NAMED and given[name] != _DEFAULTS.get(name, given[name])]
    return ", ".join([*words, *(f"{name}={given[name]}" for name in others)])


def rows(record: Record) -> list[Row]:
    """By length and setting, full attention first; only documents that full attention has answered about."""
    measured = [cell for cell in record["cells"] if "outcomes" in cell]
    full = {(cell["tokens"], cell["document"]): cell for cell in measured if cell["setting"] is None}
    found = []
    for (tokens, _), cells in by(measured, lambda cell: (cell["tokens"], repr(cell["setting"]))).items():
        pairs = [(cell, full[at]) for cell in cells if (at := (tokens, cell["document"])) in full]
        if pairs:
            found.append(_row(tokens, pairs))
    return found


def _row(tokens: int, pairs: Sequence[tuple[Record, Record]]) -> Row:
    cells = [cell for cell, _ in pairs]
    cases = [case for cell, base in pairs for case in zip(cell["outcomes"], base["outcomes"])]
    tasks = by(cases, lambda case: case[0]["task"])
    groups = {HEADLINE: [case for case in cases if case[0]["task"] in RETRIEVAL], ALL: cases}
    groups |= {task: tasks[task] for task in TASKS if task in tasks}
    asked = [(cell, base, name) for cell, base in pairs for name in cell["wanted"]]
    written = [(cell["said"], base["said"], name) for cell, base, name in asked]
    attended = [cell["attended"] for cell in cells]
    layers = by((one for cell in cells for one in cell["layers"]), lambda one: one["layer"])
    context = statistics.fmean(cell["context"] for cell in cells)
    return Row(
        tokens,
        cells[0]["setting"],
        {task: _score(group) for task, group in groups.items()},
        Mean.of(float(cell["said"].get(name) == cell["wanted"][name]) for cell, _, name in asked),
        Mean.of(float(said.get(name) == full[name]) for said, full, name in written if name in full),
        context if None in attended else statistics.fmean(attended),
        context,
        sum(cell["seconds"] for cell in cells),
        {name: mean_of(cell[name] for cell in cells) for name in INSIDE},
        [_layer(parts) for parts in layers.values()],
    )


def _layer(parts: Sequence[Record]) -> Record:
    """Means over documents."""
    return {name: mean_of(one[name] for one in parts) for name in ("layer", "attended", *INSIDE)}


def _score(cases: Sequence[tuple[Record, Record]]) -> Score:
    answers = [
        (mine, theirs, tokens)
        for one, base in cases
        for mine, theirs, tokens in zip(one["log_probs"], base["log_probs"], one["tokens"])
    ]
    steps = [(sum(one["divergences"]), len(one["divergences"])) for one, _ in cases if one["divergences"]]
    return Score(
        right=Mean.of(float(yes) for one, _ in cases for yes in one["right"]),
        log_prob=Mean.of(mine for mine, _, _ in answers),
        loss=Mean.of(theirs - mine for mine, theirs, _ in answers),
        token_log_prob=Mean.pooled([(mine, tokens) for mine, _, tokens in answers]),
        token_loss=Mean.pooled([(theirs - mine, tokens) for mine, theirs, tokens in answers]),
        divergence=Mean.pooled(steps),
    )


def mean_of(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None
