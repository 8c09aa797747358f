"""A study as plots, one file per question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scout_hf.eval.bench.report import NO_PLOT, save_figure
from scout_hf.eval.fidelity.cells import CONTROLS
from scout_hf.eval.fidelity.summary import AXES, CENTRE, Row, along, digests, find, full_at, points, rows, rows_at
from scout_hf.eval.fidelity.tables import NAMES

QUERIES = {"real": "one tier", "predicted-auto": 'two tiers, cpu_query="auto"'}
LABELS = {"oracle": "the best blocks"}
BY_LAYER = {"real-two-tiers": "-", "predicted-auto": "--"}
INSIDE = {
    "cosine": "cosine of predicted to real query",
    "block_recall": "block recall",
    "mass": "attention mass captured",
}
RECALLS = {"predicted": "with recall", "predicted-no-recall": "without recall"}
COLOURS = {"oracle": "#333333", "minmax": "#d62728", "sign": "#1f77b4", "random": "#b0b0b0", "recent": "#8c8c8c"}
MORE_COLOURS = ("#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2")
SIZE = {"figsize": (12, 4.4), "layout": "constrained", "dpi": 130}


def save_plots(record: dict[str, Any], folder: Path) -> list[str]:
    """Write what there is data for as PNG; lines that say what was written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return [NO_PLOT]
    asked, text = rows(record["cells"], text=False), rows(record["cells"], text=True)
    lines = []
    for name, draw in PLOTS.items():
        figure = Figure(**SIZE)
        if draw(figure, asked, text):
            lines.append(save_figure(figure, folder / f"fidelity_{name}.png"))
    return lines


def _by_query(figure, table: Sequence[Row], label: str, factor: float) -> bool:
    """By budget and by context, for the real and the predicted query."""
    shown = [(axis, mode) for axis in ("budget", "tokens") if len(points(table, axis)) > 1 for mode in QUERIES]
    if not shown:
        return False
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for panel, (axis, mode) in zip(panels, shown):
        names = [name for name, _ in points(table, axis)]
        for digest, colour in _coloured(digests(table)):
            of = along(table, axis, digest, mode)
            if len(of) > 1:
                # Where it takes what another digest gives, both are seen.
                style = {"color": colour, "linestyle": "--" if digest == "auto" else "-"}
                _line(panel, map(names.index, of), of.values(), factor, label=LABELS.get(digest, digest), **style)
        full = [full_at(table, setting) for _, setting in points(table, axis)]
        if all(full):
            _line(panel, range(len(names)), full, factor, label="full attention", color="black", linestyle="--")
        panel.set_xticks(range(len(names)), names)
        panel.set(title=QUERIES[mode], xlabel=AXES[axis])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(label)
    _legend(figure, panels)
    return True


def _line(panel, places, held: Sequence[Row], factor: float, **style: Any) -> None:
    scores = [row.score for row in held]
    # The spread of perplexity is that between texts, which all settings share.
    error = [factor * score.error for score in scores] if factor != 1.0 else None
    middle = [factor * score.value for score in scores]
    panel.errorbar(list(places), middle, yerr=error, marker="o", markersize=4, capsize=2, linewidth=1.4, **style)


def _layers(figure, asked: Sequence[Row], text: Sequence[Row]) -> bool:
    """Cosine, block recall and captured mass by layer, at the centre."""
    found = rows_at(asked, CENTRE) or rows_at(text, CENTRE)
    parts = [(name, title) for name, title in INSIDE.items() if any(_by_layer(row, name) for row in found)]
    if not parts:
        return False
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    drawn = [(*coloured, mode) for coloured in _coloured(digests(found)) for mode in BY_LAYER]
    for panel, (name, title) in zip(panels, parts):
        for digest, colour, mode in drawn:
            row = find(found, digest=digest, mode=mode)
            if values := _by_layer(row, name) if row else {}:
                style = {"linestyle": BY_LAYER[mode], "color": colour, "label": f"{digest}, {NAMES[mode]}"}
                panel.plot(list(values), list(values.values()), marker="o", markersize=3, **style)
        panel.set(title=title, xlabel="layer", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    _legend(figure, panels)
    return True


def _by_layer(row: Row, name: str) -> dict[int, float]:
    """Means over a row's cells per layer, of those that have it."""
    values: dict[int, list[float]] = {}
    for record in row.records:
        for layer, value in enumerate(record.get(name) or ()):
            if value is not None:
                values.setdefault(layer, []).append(value)
    return {layer: sum(values[layer]) / len(values[layer]) for layer in sorted(values)}


def _cpu_ratio(figure, asked: Sequence[Row], text: Sequence[Row]) -> bool:
    """The CPU's share over decode steps of text, with and without recall."""
    found = [row for row in rows_at(text, CENTRE) if row.records[0].get("cpu_ratio_by_step")]
    pairs = {name: [find(found, digest=name, mode=mode) for mode in RECALLS] for name in digests(found)}
    name = next((name for name, pair in pairs.items() if all(pair) and name not in CONTROLS), None)
    if name is None:
        return False
    panels = figure.subplots(1, 2, sharey=True)
    for panel, row, title in zip(panels, pairs[name], RECALLS.values()):
        for layer, ratios in row.records[0]["cpu_ratio_by_step"].items():
            steps, shares = range(1, len(ratios) + 1), [100 * ratio for ratio in ratios]
            panel.plot(steps, shares, label=f"layer {layer}", linewidth=1.2)
        panel.set(title=f"{title}, blocks by {name}", xlabel="decode step", ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of the chosen blocks that the CPU attends, %")
    panels[0].legend(fontsize=8)
    return True


def _coloured(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    spare = iter(MORE_COLOURS * 4)
    return ((name, COLOURS.get(name) or next(spare)) for name in names)


def _legend(figure, panels) -> None:
    named = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), fontsize=8, loc="outside right upper")


PLOTS: dict[str, Callable[..., bool]] = {
    "accuracy": lambda figure, asked, text: _by_query(figure, asked, "questions answered, %", 100.0),
    "perplexity": lambda figure, asked, text: _by_query(figure, text, "perplexity", 1.0),
    "layers": _layers,
    "cpu_ratio": _cpu_ratio,
}
