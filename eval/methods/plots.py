"""Plots of the comparison: each draws one record on axes that it is given; False where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable

from scout_hf.diagnostics import PARTS
from scout_hf.eval.arms import ABLATIONS, PREDICTED, STOCK
from scout_hf.eval.methods import view
from scout_hf.eval.methods.tables import ABLATION, GAINS
from scout_hf.eval.methods.view import Cell, Record
from scout_hf.eval.tables import by, short, three

ORDER = ("scout", PREDICTED, "hgca", "infinigen, kept", "infinigen", "kvpr", "dense", *STOCK)
ABLATION_NAMES = ("neither", "+ one layer ahead", "+ recall")
PART_COLOURS = dict(zip(PARTS, ("#1f77b4", "#d62728", "#ff7f0e", "#9467bd", "#d9d9d9")))
COLOURS = {
    "stock": "#333333", "stock folded": "#8c8c8c", "stock quantized": "#bcbd22", "kvpress": "#e377c2",
    "scout": "#1f77b4", "scout, one tier": "#17becf", "scout, predicted": "#6baed6",
    "scout, predicted, no recall": "#9ecae1", "scout, neither": "#c6dbef", "hgca": "#2ca02c", "infinigen": "#ff7f0e",
    "infinigen, kept": "#ffbb78", "kvpr": "#9467bd", "dense": "#d62728",
}  # fmt: skip


def throughput(record: Record, axes) -> bool:
    """Draw tokens per second against context, as in figure 8 of the paper."""
    axes.set(ylabel="tokens/s", title="throughput against context")
    return _lines(record, axes, lambda one: one["tokens_per_s"])


def memory(record: Record, axes) -> bool:
    """Draw KV bytes on the device against context."""
    axes.set(ylabel="MiB on the device", title="device memory against context")
    return _lines(record, axes, lambda one: one["device_bytes"] / 2**20)


def _lines(record: Record, axes, value: Callable[[Cell], float]) -> bool:
    place = view.widest(record, view.main_shape(record))
    if place is None:
        return False
    alike = [one for one in view.places(record, place.shape) if one.batch == place.batch]
    if len(alike) == 1:
        cells = [one for one in view.measured(view.at(record, place)) if one["way"] in ORDER]
        _bars(axes, cells, [value(one) for one in cells], [f" {three(value(one))}" for one in cells])
        axes.margins(x=0.15)
        axes.set(xlabel=axes.get_ylabel(), ylabel="")
        axes.set_title(axes.get_title().replace("against context", f"at {short(place.context)}, batch {place.batch}"))
        return True
    cells = [(here.context, one) for here in alike for one in view.measured(view.at(record, here))]
    for way in ORDER:
        if points := [(context, value(one)) for context, one in cells if one["way"] == way]:
            # Two that lie on each other are both seen.
            style = "--" if way in ("kvpr", "stock folded") else "-"
            axes.plot(*zip(*points), marker="o", linestyle=style, color=_colour(way), label=way)
    axes.set_yscale("log")
    _doubling(axes, {here.context: short(here.context) for here in alike})
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=f"tokens of context, batch {place.batch}")
    return _beside(axes)


def accuracy(record: Record, axes) -> bool:
    """Draw right answers against budget; arms without a budget are horizontal lines."""
    rows = by((one for one in view.scores(record) if one["way"] not in ABLATIONS), lambda one: one["way"])
    if not rows:
        return False
    swept = {way: mine for way, mine in rows.items() if mine[0]["budget"] != mine[0]["context"]}
    for way, mine in swept.items():
        axes.plot([one["budget"] for one in mine], [100 * one["share"] for one in mine], marker="o",
                  color=_colour(way), label=way)  # fmt: skip
    for share, names in by((way for way in rows if way not in swept), lambda way: 100 * rows[way][0]["share"]).items():
        axes.axhline(share, color=_colour(names[0]), linestyle=":", linewidth=1.5, label=", ".join(names))
    _doubling(axes, {one["budget"]: str(one["budget"]) for mine in swept.values() for one in mine})
    context = next(iter(rows.values()))[0]["context"]
    axes.set(xlabel=f"budget in tokens, of a document of {short(context)}", ylabel="right, %", ylim=(-3, 104))
    axes.set_title("answers of the trained model")
    return _beside(axes)


def shares(record: Record, axes) -> bool:
    """Draw the parts of a step; older records have only the time of waiting."""
    place = view.widest(record, view.main_shape(record))
    cells = view.measured(view.at(record, place))
    if not cells:
        return False
    names, whole = [one["way"] for one in cells], all("shares" in one for one in cells)
    found = {part: [100 * one["shares"][part] for one in cells] for part in PARTS} if whole else {}
    if not whole:
        found["wait"] = [100 * one.get("join_ms", 0.0) / one["step_ms"] for one in cells]
        found["rest"] = [100 - waited for waited in found["wait"]]
    left = [0.0] * len(cells)
    for part, wide in found.items():
        label = PARTS[part] if whole or part == "wait" else "everything else"
        axes.barh(names, wide, left=left, color=PART_COLOURS[part], label=label)
        left = [before + width for before, width in zip(left, wide)]
    for index, one in enumerate(cells):
        axes.text(101, index, f"{three(one['step_ms'])} ms", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="% of a step", xlim=(0, 100), title=f"a step at {place}")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.13), ncols=2, frameon=False)
    return True


def equal_memory(record: Record, axes) -> bool:
    """Draw throughput with as many rows as fit into the same device memory, at the longest context."""
    groups = {key: [one for one in view.measured(cells) if one["way"] in ORDER]
              for key, cells in view.equal(record).items() if view.measured(cells)}  # fmt: skip
    if not groups:
        return False
    context, gib = max(groups, key=lambda key: (key[1] is not None, key[0], key[1] or 0))
    cells = groups[context, gib]
    labels = [f" {three(one['tokens_per_s'])}, {one['batch']} row{'s' * (one['batch'] > 1)}" for one in cells]
    _bars(axes, cells, [one["tokens_per_s"] for one in cells], labels)
    axes.margins(x=0.3)
    what = f"{gib:g} GiB" if gib else "the memory of one stock row"
    axes.set(xlabel="tokens/s", title=f"equal device memory: {what}, {short(context)} tokens")
    return True


def ablation(record: Record, axes) -> bool:
    """Draw what predicting one layer ahead and recall each add, beside figure 12 of the paper."""
    several = len({one.batch for one in view.places(record)}) > 1
    speeds = {place: view.figures_of(record, place) for place in view.places(record, view.main_shape(record))}
    bars = {
        f"{short(place.context)} tokens{f', batch {place.batch}' * several}": [
            speed[name] / speed[ABLATION[0]] for name in ABLATION
        ]
        for place, speed in speeds.items()
        if all(name in speed for name in ABLATION)
    }
    if not bars:
        return False
    bars["the paper, 32k"] = [1.0, GAINS[0], GAINS[0] * GAINS[1]]
    width, last = 0.84 / len(bars), len(bars) - 1
    for number, (name, heights) in enumerate(bars.items()):
        where = [index + (number - last / 2) * width for index in range(3)]
        shade = "white" if number == last else str(0.75 - 0.5 * number / max(1, last - 1))
        style = {"edgecolor": "#333333", "hatch": "///"} if number == last else {}
        drawn = axes.bar(where, heights, width * 0.93, color=shade, label=name, **style)
        labels = ["", *(f"{height:.2f}" for height in heights[1:])]
        axes.bar_label(drawn, labels, fontsize=7 if len(bars) < 5 else 6, padding=2)
    axes.set_xticks(range(3), ABLATION_NAMES)
    axes.set(ylabel="throughput, neither = 1", title="what each part of scout adds")
    axes.grid(alpha=0.3, axis="y")
    return _beside(axes)


def _colour(way: str) -> str:
    return COLOURS.get(way, "#8c564b")


def _bars(axes, cells: list[Cell], heights: list[float], labels: list[str]) -> None:
    drawn = axes.barh([one["way"] for one in cells], heights, color=[_colour(one["way"]) for one in cells])
    axes.bar_label(drawn, labels, fontsize=8)
    axes.invert_yaxis()


def _doubling(axes, ticks: dict[int, str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ticks), [ticks[value] for value in sorted(ticks)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _beside(axes) -> bool:
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0)
    return True


ALL = (throughput, accuracy, memory, equal_memory, shares, ablation)


def plot(record: Record, figure) -> None:
    """Draw all plots on one figure."""
    figure.set_size_inches(14, 12)
    layers = view.layers_of(record, view.main_shape(record))
    figure.suptitle(f"{layers} layers; {view.emulated(record, why=False)}", fontsize=10)
    for draw, axes in zip(ALL, figure.subplots(3, 2).flat):
        if not draw(record, axes):
            axes.clear()
            axes.set_axis_off()
            axes.text(0.5, 0.5, f"{draw.__name__.replace('_', ' ')}: not measured", ha="center", color="#888888")
