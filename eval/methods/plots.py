"""Plots of the comparison; each draws one record on axes that it is given."""

from __future__ import annotations

from typing import Any

from scout_hf.eval.bench.formats import short
from scout_hf.eval.methods import view
from scout_hf.eval.methods.tables import widest

ORDER = ("scout", "hgca", "infinigen", "kvpr", "dense", "stock")
ABLATION = ("scout, neither", "scout, no recall", "scout")
ABLATION_NAMES = ("neither", "+ one layer ahead", "+ recall")


def throughput(record: dict[str, Any], axes) -> None:
    """Tokens per second against context, as the paper's figure 8."""
    _lines(record, axes, lambda one: one["tokens_per_s"])
    axes.set(ylabel="tokens/s", title="throughput against context")


def memory(record: dict[str, Any], axes) -> None:
    """KV on the device against context."""
    _lines(record, axes, lambda one: one["device_bytes"] / 2**20)
    axes.set(ylabel="MiB on the device", title="device memory against context")


def _lines(record: dict[str, Any], axes, value) -> None:
    for way in ORDER:
        points = [
            (place.context, value(one))
            for place in view.places(record)
            if place.shape == "gqa"
            for one in view.measured(view.at(record, place))
            if one["way"] == way
        ]
        if points:
            axes.plot(*zip(*points), marker="o", color=view.COLOURS[way], label=way)
    contexts = sorted({place.context for place in view.places(record) if place.shape == "gqa"})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [short(context) for context in contexts])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="tokens of context")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def accuracy(record: dict[str, Any], axes) -> None:
    """Right answers against budget; exact ways as lines across."""
    rows = list(view.scores(record))
    for way in dict.fromkeys(one["way"] for one in rows):
        mine = [one for one in rows if one["way"] == way]
        shares = [100 * one["right"] / one["questions"] for one in mine]
        if way in ("scout, neither", "scout, no recall"):
            continue
        if mine[0]["budget"] == mine[0]["context"]:
            axes.axhline(shares[0], color=view.COLOURS[way], linestyle=":", linewidth=1.5, label=way)
        else:
            axes.plot([one["budget"] for one in mine], shares, marker="o", color=view.COLOURS[way], label=way)
    axes.set_xscale("log", base=2)
    budgets = sorted({one["budget"] for one in rows if one["budget"] != one["context"]})
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.minorticks_off()
    axes.set(xlabel="budget, tokens", ylabel="right, %", title="answers of the trained model", ylim=(-3, 104))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")


def shares(record: dict[str, Any], axes) -> None:
    """What a step is made of: waiting for link or CPU, and everything else."""
    place = widest(record, "gqa")
    cells = view.measured(view.at(record, place)) if place else []
    names = [one["way"] for one in cells]
    waits = [100 * one.get("join_ms", 0.0) / one["step_ms"] for one in cells]
    axes.barh(names, [100 - wait for wait in waits], color="#9ecae1", label="the device works")
    axes.barh(names, waits, left=[100 - wait for wait in waits], color="#d62728", label="it waits for link or CPU")
    axes.invert_yaxis()
    axes.set(xlabel="% of a step", xlim=(0, 100))
    axes.set_title(f"a step at {short(place.context)} tokens" if place else "", loc="left")
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)


def equal_memory(record: dict[str, Any], axes) -> None:
    """Throughput of as many rows as fit into the device memory of one stock row."""
    cells = [one for one in record["cells"] if one["part"] == "equal" and "step_ms" in one and one["way"] in ORDER]
    cells.sort(key=lambda one: ORDER.index(one["way"]))
    drawn = axes.barh([one["way"] for one in cells], [one["tokens_per_s"] for one in cells],
                      color=[view.COLOURS[one["way"]] for one in cells])  # fmt: skip
    axes.bar_label(drawn, [f" {one['tokens_per_s']:.1f}, batch {one['batch']}" for one in cells], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set(xlabel="tokens/s")
    axes.set_title(f"equal device memory, {short(cells[0]['context'])} tokens" if cells else "equal device memory")


def ablation(record: dict[str, Any], axes) -> None:
    """What one layer ahead and recall each add, as the paper's figure 12."""
    found = [place for place in view.places(record) if place.shape == "gqa"]
    width = 0.8 / max(1, len(found))
    for number, place in enumerate(found):
        by_way = {one["way"]: one for one in view.measured(view.at(record, place))}
        if not all(name in by_way for name in ABLATION):
            continue
        base = by_way[ABLATION[0]]["tokens_per_s"]
        heights = [by_way[name]["tokens_per_s"] / base for name in ABLATION]
        where = [index + (number - (len(found) - 1) / 2) * width for index in range(3)]
        shade = str(0.75 - 0.55 * number / max(1, len(found) - 1)) if len(found) > 1 else "0.4"
        drawn = axes.bar(where, heights, width * 0.95, color=shade, label=f"{short(place.context)} tokens")
        axes.bar_label(drawn, [f"{height:.2f}" for height in heights], fontsize=7, padding=2)
    axes.set_xticks(range(3), ABLATION_NAMES)
    axes.set(ylabel="throughput, neither = 1", title="what each part of scout adds")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)


ALL = (throughput, accuracy, memory, equal_memory, shares, ablation)


def plot(record: dict[str, Any], figure) -> None:
    """All of them on one figure."""
    figure.set_size_inches(13, 11)
    for draw, axes in zip(ALL, figure.subplots(3, 2).flat):
        draw(record, axes)
