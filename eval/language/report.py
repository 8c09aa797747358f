"""The study of a language model as tables, Markdown and one picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scout_hf.eval.bench.report import NO_PLOT, save_figure
from scout_hf.eval.tables import NONE, Grid, by, share

NOTE = (
    "right: answers that greedy decoding gives, after all that is before them. log-prob: of the right answer, in nats, "
    "less that of full attention. KL: divergence of the next token's distribution from full attention's, in nats, mean "
    "over decode steps. Figures are means ± standard errors, over answers and over cases. mass: attention captured, in "
    "a sample of layers and heads."
)


@dataclass(frozen=True)
class Mean:
    """A mean, its standard error, and of how many."""

    value: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """None of nothing is nan."""
        if not values:
            return cls(float("nan"), float("nan"), 0)
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        return cls(statistics.fmean(values), spread / len(values) ** 0.5, len(values))

    def shown(self, digits: int) -> str:
        """``-0.12 ± 0.03``."""
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}" if self.n > 1 else f"{self.value:.{digits}f}"


@dataclass(frozen=True)
class Row:
    """One setting at one length: all documents together."""

    tokens: int
    setting: dict[str, Any] | None
    task: str
    right: Mean
    lost: Mean
    divergence: Mean
    attended: float
    context: float
    mass: float | None
    cosine: float | None
    cpu_ratio: float | None

    @property
    def label(self) -> str:
        """What differs between settings, in words."""
        if self.setting is None:
            return "full attention"
        return label(self.setting)


def label(setting: dict[str, Any]) -> str:
    """Such as ``512, sign, two tiers``."""
    tier = {"cpu": f", two tiers, {setting['cpu_query']}"}.get(setting["split"], "")
    budget = "everything" if setting["budget"] is None else setting["budget"]
    return f"{budget}, {setting['digest']}{tier}"


def rows(record: dict[str, Any], tasks: bool = False) -> list[Row]:
    """By length and setting, and with ``tasks`` by task."""
    found = []
    measured = [cell for cell in record["cells"] if "outcomes" in cell]
    full = {(cell["tokens"], cell["document"]): cell for cell in measured if cell["setting"] is None}
    for (tokens, _), cells in by(measured, lambda cell: (cell["tokens"], repr(cell["setting"]))).items():
        pairs = [
            (one, base, cell)
            for cell in cells
            if (at := (cell["tokens"], cell["document"])) in full
            for one, base in zip(cell["outcomes"], full[at]["outcomes"])
        ]
        groups = by(pairs, lambda pair: pair[0]["task"]) if tasks else {"all": pairs}
        found += [_row(tokens, task, group, cells) for task, group in groups.items()]
    return found


def _row(tokens: int, task: str, pairs: Sequence[tuple[Any, Any, Any]], cells: Sequence[dict[str, Any]]) -> Row:
    def mean(name: str) -> float | None:
        values = [cell[name] for cell in cells if cell[name] is not None]
        return statistics.fmean(values) if values else None

    lost = [mine - theirs for one, base, _ in pairs for mine, theirs in zip(one["log_probs"], base["log_probs"])]
    right = [float(yes) for one, _, _ in pairs for yes in one["right"]]
    # Steps of one case go together.
    divergences = [statistics.fmean(one["divergences"]) for one, _, _ in pairs if one["divergences"]]
    context = mean("context") or 0.0
    return Row(
        tokens,
        cells[0]["setting"],
        task,
        Mean.of(right),
        Mean.of(lost),
        Mean.of(divergences or [0.0]),
        context if mean("attended") is None else mean("attended"),
        context,
        mean("mass"),
        mean("cosine"),
        mean("cpu_ratio"),
    )


def tables(record: dict[str, Any]) -> Iterator[Grid | str]:
    """For a terminal, and for Markdown."""
    names = ("tokens", "budget, digest", "attended", "right", "log-prob", "KL", "mass", "cosine", "CPU")
    table = Grid(f"{record['model']}: what sparse decoding loses", names, 2)
    every = rows(record)
    for tokens, group in by(every, lambda row: row.tokens).items():
        for row in group:
            figures = (row.right.shown(2), row.lost.shown(2), row.divergence.shown(3))
            rest = (share(row.mass), _two(row.cosine), share(row.cpu_ratio))
            place, last = str(tokens) if row is group[0] else "", row is group[-1]
            table.add(place, row.label, f"{row.attended:.0f}", *figures, *rest, end=last)
    yield table
    tasks = list(dict.fromkeys(row.task for row in rows(record, tasks=True)))
    table = Grid("by task: right, and log-prob less that of full attention", ("tokens", "budget, digest", *tasks), 2)
    for (tokens, _), group in by(rows(record, tasks=True), lambda row: (row.tokens, repr(row.setting))).items():
        told = {row.task: f"{row.right.value:.2f} {row.lost.value:+.2f}" for row in group}
        table.add(str(tokens), group[0].label, *(told.get(task, NONE) for task in tasks))
    yield table
    full = [row for row in every if row.setting is None]
    answers = ", ".join(f"{row.right.n} answers at {row.tokens}" for row in full)
    yield f"{answers} tokens; {NOTE}"


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def save_plot(record: dict[str, Any], path: Path) -> str:
    """Loss over what was attended, a panel each for log-probability and divergence; the line that says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return NO_PLOT
    figure = Figure(figsize=(11, 4.4), layout="constrained", dpi=130)
    panels = figure.subplots(1, 2)
    sparse = [row for row in rows(record) if row.setting is not None]
    kinds = by(sparse, lambda row: (row.tokens, label(row.setting).partition(", ")[2]))
    for (tokens, kind), group in kinds.items():
        points = sorted(group, key=lambda row: row.attended)
        for panel, name in zip(panels, ("lost", "divergence")):
            means = [getattr(row, name) for row in points]
            panel.errorbar(
                [row.attended / row.context for row in points],
                [mean.value for mean in means],
                [0 if mean.error != mean.error else mean.error for mean in means],
                marker="o",
                markersize=4,
                capsize=2,
                label=f"{tokens} tokens, {kind}",
            )
    panels[0].axhline(0, color="#333333", linewidth=0.8)
    panels[0].set(ylabel="nats, less full attention's", title="log-probability of right answers")
    panels[1].set(ylabel="nats per decode step", title="KL divergence from full attention", yscale="symlog")
    for panel in panels:
        panel.set(xlabel="share of the context that is attended", xlim=(0, None))
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=8)
    figure.suptitle(f"{record['model']}: what sparse decoding loses", fontsize=11)
    return save_figure(figure, path)
