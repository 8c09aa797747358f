"""A study as plots, one file per question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scout_hf.eval.fidelity.cells import CONTROLS
from scout_hf.eval.fidelity.summary import Row, find, rows
from scout_hf.eval.fidelity.tables import NAMES
from scout_hf.eval.fidelity.views import AXES, CENTRE, along, digests, full_at, points, rows_at
from scout_hf.files import whole_file

NO_PLOTS = "no plots: they take matplotlib, which pip install 'scout_hf[bench]' brings"
QUERIES = {"real": "one tier", "predicted-auto": 'two tiers, cpu_query="auto"'}
LABELS = {"oracle": "the best blocks"}
BY_LAYER = {"real-two-tiers": "-", "predicted-auto": "--"}
INSIDE = {
    "cosine": "cosine of predicted to real query",
    "block_recall": "block recall",
    "mass": "attention mass captured",
}
COLOURS = {"oracle": "#333333", "minmax": "#d62728", "sign": "#1f77b4", "random": "#b0b0b0", "recent": "#8c8c8c"}
MORE_COLOURS = ("#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2")
SIZE = {"figsize": (12, 4.4), "layout": "constrained", "dpi": 130}


def save_plots(record: dict[str, Any], folder: Path) -> list[str]:
    """Write what there is data for as PNG; lines that say what was written."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return [NO_PLOTS]
    asked, text = rows(record["cells"], text=False), rows(record["cells"], text=True)
    lines = []
    for name, draw in PLOTS.items():
        figure = Figure(**SIZE)
        if draw(figure, asked, text):
            path = folder / f"fidelity_{name}.png"
            with whole_file(path, binary=True) as file:
                figure.savefig(file, format="png")
            lines.append(f"wrote {path}")
    return lines


def _accuracy(figure, asked: Sequence[Row], text: Sequence[Row]) -> bool:
    """By budget and by context, for the real and the predicted query."""
    return _by_query(figure, asked, ("budget", "tokens"), "questions answered, %", 100.0)


def _perplexity(figure, asked: Sequence[Row], text: Sequence[Row]) -> bool:
    return _by_query(figure, text, ("budget", "tokens"), "perplexity", 1.0)


def _by_query(figure, table: Sequence[Row], axes: Sequence[str], label: str, factor: float) -> bool:
    shown = [axis for axis in axes if len(points(table, axis)) > 1]
    if not shown:
        return False
    panels = figure.subplots(1, 2 * len(shown), sharey=True, squeeze=False)[0]
    for panel, (axis, mode) in zip(panels, ((axis, mode) for axis in shown for mode in QUERIES)):
        names = [name for name, _ in points(table, axis)]
        for digest, colour in _coloured(digests(table)):
            of = {name: row for name, row in along(table, axis, digest, mode).items() if name in names}
            if len(of) > 1:
                _line(
                    panel,
                    [names.index(name) for name in of],
                    of.values(),
                    factor,
                    label=LABELS.get(digest, digest),
                    color=colour,
                    # Where it takes what another digest gives, both are seen.
                    linestyle="--" if digest == "auto" else "-",
                )
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
            values = _by_layer(row, name) if row else {}
            if values:
                style = {"linestyle": BY_LAYER[mode], "color": colour, "label": f"{digest}, {NAMES[mode]}"}
                panel.plot(list(values), list(values.values()), marker="o", markersize=3, **style)
        panel.set(title=title, xlabel="layer", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    _legend(figure, panels)
    return True


def _by_layer(row: Row, name: str) -> dict[int, float]:
    """Means over a row's cells per layer, of those that have it."""
    lists = [record[name] for record in row.records if record.get(name)]
    found = {}
    for layer in range(max(map(len, lists), default=0)):
        values = [one[layer] for one in lists if layer < len(one) and one[layer] is not None]
        if values:
            found[layer] = sum(values) / len(values)
    return found


def _cpu_ratio(figure, asked: Sequence[Row], text: Sequence[Row]) -> bool:
    """The CPU's share over decode steps of text, with and without recall."""
    modes = {"predicted": "with recall", "predicted-no-recall": "without recall"}
    found = [row for row in rows_at(text, CENTRE) if row.records[0].get("cpu_ratio_by_step")]
    names = [name for name in digests(found) if name not in CONTROLS]
    pairs = {name: [find(found, digest=name, mode=mode) for mode in modes] for name in names}
    both = [name for name, pair in pairs.items() if all(pair)]
    if not both:
        return False
    panels = figure.subplots(1, 2, sharey=True)
    for panel, row, title in zip(panels, pairs[both[0]], modes.values()):
        for layer, ratios in row.records[0]["cpu_ratio_by_step"].items():
            steps, shares = range(1, len(ratios) + 1), [100 * ratio for ratio in ratios]
            panel.plot(steps, shares, label=f"layer {layer}", linewidth=1.2)
        panel.set(title=f"{title}, blocks by {both[0]}", xlabel="decode step", ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("share of the chosen blocks that the CPU attends, %")
    panels[0].legend(fontsize=8)
    return True


def _coloured(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    spare = iter(MORE_COLOURS * 4)
    for name in names:
        yield name, COLOURS.get(name) or next(spare)


def _legend(figure, panels) -> None:
    named = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(named.values(), named.keys(), fontsize=8, loc="outside right upper")


PLOTS: dict[str, Callable[..., bool]] = {
    "accuracy": _accuracy,
    "perplexity": _perplexity,
    "layers": _layers,
    "cpu_ratio": _cpu_ratio,
}
