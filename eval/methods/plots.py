"""Plots of the comparison: each draws one record on axes that it is given; False where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scout_hf.eval.bench.formats import short, three
from scout_hf.eval.methods import paper, view
from scout_hf.eval.methods.parts import PARTS
from scout_hf.eval.methods.tables import layers_of, widest
from scout_hf.eval.methods.ways import ABLATIONS, PREDICTED, STOCK

ORDER = ("scout", PREDICTED, "hgca", "infinigen, kept", "infinigen", "kvpr", "dense", *STOCK)
ABLATION_NAMES = ("neither", "+ one layer ahead", "+ recall")
PART_COLOURS = dict(zip(PARTS, ("#1f77b4", "#d62728", "#ff7f0e", "#9467bd", "#d9d9d9")))
NOT_SWEPT = ABLATIONS


def throughput(record: dict[str, Any], axes) -> bool:
    """Tokens per second against context, as the paper's figure 8."""
    axes.set(ylabel="tokens/s", title="throughput against context")
    return _lines(record, axes, lambda one: one["tokens_per_s"])


def memory(record: dict[str, Any], axes) -> bool:
    """KV on the device against context."""
    axes.set(ylabel="MiB on the device", title="device memory against context")
    return _lines(record, axes, lambda one: one["device_bytes"] / 2**20)


def _lines(record: dict[str, Any], axes, value: Callable[[dict[str, Any]], float]) -> bool:
    place = widest(record, view.main_shape(record))
    if place is None:
        return False
    alike = [one for one in view.places(record) if (one.shape, one.batch) == (place.shape, place.batch)]
    if len({here.context for here in alike}) == 1:
        cells = [one for one in view.measured(view.at(record, place)) if one["way"] in ORDER]
        heights = [value(one) for one in cells]
        drawn = axes.barh([one["way"] for one in cells], heights, color=[view.colour(one["way"]) for one in cells])
        axes.bar_label(drawn, [f" {three(height)}" for height in heights], fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set(xlabel=axes.get_ylabel(), ylabel="")
        axes.set_title(axes.get_title().replace("against context", f"at {short(place.context)}, batch {place.batch}"))
        return True
    for way in ORDER:
        points = [
            (here.context, value(one))
            for here in alike
            for one in view.measured(view.at(record, here))
            if one["way"] == way
        ]
        if points:
            # Two that lie on each other are both seen.
            style = "--" if way in ("kvpr", "stock folded") else "-"
            axes.plot(*zip(*points), marker="o", linestyle=style, color=view.colour(way), label=way)
    contexts = [here.context for here in alike]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [short(context) for context in contexts])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=f"tokens of context, batch {place.batch}")
    axes.grid(alpha=0.3)
    return _beside(axes)


def accuracy(record: dict[str, Any], axes) -> bool:
    """Right answers against budget; ways without one as lines across."""
    rows = [one for one in view.scores(record) if one["way"] not in NOT_SWEPT]
    if not rows:
        return False
    across: dict[float, list[str]] = {}
    for way in dict.fromkeys(one["way"] for one in rows):
        mine = [one for one in rows if one["way"] == way]
        shares = [100 * one["right"] / one["questions"] for one in mine]
        if mine[0]["budget"] == mine[0]["context"]:
            across.setdefault(shares[0], []).append(way)
        else:
            axes.plot([one["budget"] for one in mine], shares, marker="o", color=view.colour(way), label=way)
    for share, names in across.items():
        axes.axhline(share, color=view.colour(names[0]), linestyle=":", linewidth=1.5, label=", ".join(names))
    axes.set_xscale("log", base=2)
    budgets = sorted({one["budget"] for one in rows if one["budget"] != one["context"]})
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.minorticks_off()
    axes.set(
        xlabel=f"budget in tokens, of a document of {short(rows[0]['context'])}", ylabel="right, %", ylim=(-3, 104)
    )
    axes.set_title("answers of the trained model")
    axes.grid(alpha=0.3)
    return _beside(axes)


def shares(record: dict[str, Any], axes) -> bool:
    """What a step is made of; of older records only what it waits."""
    place = widest(record, view.main_shape(record))
    cells = view.measured(view.at(record, place)) if place else []
    if not cells:
        return False
    names = [one["way"] for one in cells]
    whole = all("shares" in one for one in cells)
    left = [0.0] * len(cells)
    for part, label in PARTS.items() if whole else {"wait": PARTS["wait"]}.items():
        wide = [100 * (one["shares"][part] if whole else one.get("join_ms", 0.0) / one["step_ms"]) for one in cells]
        axes.barh(names, wide, left=left, color=PART_COLOURS[part], label=label)
        left = [before + width for before, width in zip(left, wide)]
    if not whole:
        rest = [100 - before for before in left]
        axes.barh(names, rest, left=left, color=PART_COLOURS["rest"], label="everything else")
    for index, one in enumerate(cells):
        axes.text(101, index, f"{three(one['step_ms'])} ms", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="% of a step", xlim=(0, 100), title=f"a step at {short(place.context)} tokens, batch {place.batch}")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.13), ncols=2, frameon=False)
    return True


def equal_memory(record: dict[str, Any], axes) -> bool:
    """Throughput of as many rows as fit into the same memory of the device, at the longest context."""
    groups = {key: [one for one in cells if one["way"] in ORDER] for key, cells in view.equal(record).items() if cells}
    if not groups:
        return False
    context, gib = max(groups, key=lambda key: (key[1] is not None, key[0], key[1] or 0))
    cells = groups[context, gib]
    colours = [view.colour(one["way"]) for one in cells]
    drawn = axes.barh([one["way"] for one in cells], [one["tokens_per_s"] for one in cells], color=colours)
    labels = [f" {three(one['tokens_per_s'])}, {one['batch']} row{'s' * (one['batch'] > 1)}" for one in cells]
    axes.bar_label(drawn, labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    what = f"{gib:g} GiB" if gib else "the memory of one stock row"
    axes.set(xlabel="tokens/s", title=f"equal device memory: {what}, {short(context)} tokens")
    return True


def ablation(record: dict[str, Any], axes) -> bool:
    """What one layer ahead and recall each add, beside the paper's figure 12."""
    bars: dict[str, list[float]] = {}
    for place in view.places(record):
        speed = {one["way"]: one["tokens_per_s"] for one in view.measured(view.at(record, place))}
        if place.shape == view.main_shape(record) and all(name in speed for name in paper.ABLATION):
            rows = f", batch {place.batch}" if len({one.batch for one in view.places(record)}) > 1 else ""
            heights = [speed[name] / speed[paper.ABLATION[0]] for name in paper.ABLATION]
            bars[f"{short(place.context)} tokens{rows}"] = heights
    if not bars:
        return False
    bars["the paper, 32k"] = [1.0, paper.GAINS[0], paper.GAINS[0] * paper.GAINS[1]]
    width = 0.84 / len(bars)
    for number, (name, heights) in enumerate(bars.items()):
        where = [index + (number - (len(bars) - 1) / 2) * width for index in range(3)]
        theirs = number == len(bars) - 1
        shade = "white" if theirs else str(0.75 - 0.5 * number / max(1, len(bars) - 2))
        style = {"edgecolor": "#333333", "hatch": "///"} if theirs else {}
        drawn = axes.bar(where, heights, width * 0.93, color=shade, label=name, **style)
        labels = ["", *(f"{height:.2f}" for height in heights[1:])]
        axes.bar_label(drawn, labels, fontsize=7 if len(bars) < 5 else 6, padding=2)
    axes.set_xticks(range(3), ABLATION_NAMES)
    axes.set(ylabel="throughput, neither = 1", title="what each part of scout adds")
    axes.grid(alpha=0.3, axis="y")
    return _beside(axes)


def _beside(axes) -> bool:
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, borderaxespad=0.0)
    return True


ALL = (throughput, accuracy, memory, equal_memory, shares, ablation)


def plot(record: dict[str, Any], figure) -> None:
    """All of them on one figure."""
    figure.set_size_inches(14, 12)
    figure.suptitle(f"{layers_of(record)} layers; {view.emulated(record).partition(' (')[0]}", fontsize=10)
    for draw, axes in zip(ALL, figure.subplots(3, 2).flat):
        if not draw(record, axes):
            axes.clear()
            axes.set_axis_off()
            axes.text(0.5, 0.5, f"{draw.__name__.replace('_', ' ')}: not measured", ha="center", color="#888888")
