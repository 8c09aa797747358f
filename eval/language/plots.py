"""The study of a language model as two pictures: what is lost over the budget, and attention by layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scout_hf.eval.bench.report import NO_PLOT, save_figure
from scout_hf.eval.language.figures import ALL, HEADLINE, Mean, Row, rows
from scout_hf.eval.tables import by, short

LINES = ("-", "--", ":", "-.")
INSIDE = {
    "mass": "attention mass captured",
    "output_error": "relative error of the output",
    "cosine": "cosine of predicted to real query",
    "cpu_ratio": "share of blocks on the CPU",
}


def save_plots(record: dict[str, Any], folder: Path) -> Iterator[str]:
    """Write the pictures; the lines that say so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        yield NO_PLOT
        return
    every = [row for row in rows(record) if row.setting is not None]
    figure = Figure(figsize=(11, 4.4), layout="constrained", dpi=130)
    draw_loss(figure, every)
    figure.suptitle(f"{record['model']}: what sparse decoding loses, below is better", fontsize=11)
    yield save_figure(figure, folder / "fidelity.png")
    figure = Figure(figsize=(12, 4.2), layout="constrained", dpi=130)
    if draw_layers(figure, every):
        yield save_figure(figure, folder / "fidelity_layers.png")


def draw_loss(figure: Any, every: list[Row]) -> None:
    """Loss in nats, and KL, over the tokens that are attended; one line per digest and tier."""
    panels = figure.subplots(1, 2)
    colours = _colours(every)
    styles = dict(zip(dict.fromkeys(row.tokens for row in every), itertools.cycle(LINES)))
    for (tokens, kind), group in by(every, lambda row: (row.tokens, row.kind)).items():
        points = sorted(group, key=lambda row: row.attended)
        means: tuple[list[Mean], ...] = (
            [row.scores[HEADLINE].loss for row in points],
            [row.scores[ALL].divergence for row in points],
        )
        for panel, held in zip(panels, means):
            panel.errorbar(
                [row.attended for row in points],
                [mean.value for mean in held],
                [0 if math.isnan(mean.error) else mean.error for mean in held],
                marker="o",
                markersize=4,
                capsize=2,
                color=colours[kind],
                linestyle=styles[tokens],
                label=f"{kind}, {short(tokens)}" if len(styles) > 1 else kind,
            )
    panels[0].set(ylabel="nats per answer", title="loss of log-probability of right answers")
    panels[1].set(ylabel="nats per decode step", title="KL divergence from full attention")
    for panel in panels:
        panel.axhline(0, color="#333333", linewidth=0.8)
        panel.set(xlabel="tokens attended per step, layer and KV head", xlim=(0, None))
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=8)


def draw_layers(figure: Any, every: list[Row]) -> bool:
    """What was seen by layer, of the longest documents; False if nothing was."""
    longest = max((row.tokens for row in every), default=0)
    held = [row for row in every if row.tokens == longest and row.layers]
    names = [name for name in INSIDE if any(one[name] is not None for row in held for one in row.layers)]
    if not names:
        return False
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names):
        for row in held:
            points = [(one["layer"], one[name]) for one in row.layers if one[name] is not None]
            if points:
                panel.plot(*zip(*points), marker="o", markersize=2.5, linewidth=1.1, label=row.label)
        panel.set(title=INSIDE[name], xlabel="layer", ylim=(0, None))
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.3)
    named = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), fontsize=7, loc="outside right upper")
    return True


def _colours(every: list[Row]) -> dict[str, str]:
    return {kind: f"C{number % 10}" for number, kind in enumerate(dict.fromkeys(row.kind for row in every))}
