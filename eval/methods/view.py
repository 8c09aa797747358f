"""A record of the comparison as rows that tables, plots and pages show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scout_hf.eval.methods import ways

NONE = "–"
RATES = {"link_gbps": "link", "cpu_gbps": "CPU"}
SHAPE_NAMES = {"gqa": "32 query and 8 KV heads of 64", "mha": "32 query and 32 KV heads of 64"}
COLOURS = {
    "stock": "#333333",
    "stock folded": "#8c8c8c",
    "stock quantized": "#bcbd22",
    "kvpress": "#e377c2",
    "scout": "#1f77b4",
    "scout, one tier": "#17becf",
    "scout, predicted": "#6baed6",
    "scout, predicted, no recall": "#9ecae1",
    "scout, neither": "#c6dbef",
    "hgca": "#2ca02c",
    "infinigen": "#ff7f0e",
    "infinigen, kept": "#ffbb78",
    "kvpr": "#9467bd",
    "dense": "#d62728",
}


OTHER_COLOUR = "#8c564b"


def colour(way: str) -> str:
    """Of a way in plots."""
    return COLOURS.get(way, OTHER_COLOUR)


def main_shape(record: dict[str, Any]) -> str:
    """The shape that most was measured with."""
    return record["settings"].get("shape", "gqa")


def shape_name(record: dict[str, Any], shape: str) -> str:
    """In words."""
    if shape in SHAPE_NAMES:
        return SHAPE_NAMES[shape]
    facts, name = record.get("models", {}).get(shape), Path(shape).name
    if not facts:
        return name
    heads = f"{facts['num_attention_heads']} query and {facts['num_key_value_heads']} KV heads of {facts['head_dim']}"
    return f"{name}, {heads}"


class Place(NamedTuple):
    """Cells that may be compared: one shape, context and batch."""

    shape: str
    context: int
    batch: int


def places(record: dict[str, Any]) -> list[Place]:
    """All places of the record, in the order of shape, batch and context."""
    found = {Place(one["shape"], one["context"], one["batch"]) for one in _part(record, "speed")}
    return sorted(found, key=lambda place: (place.shape, place.batch, place.context))


def at(record: dict[str, Any], place: Place) -> list[dict[str, Any]]:
    """The cells of a place, in the order of ways."""
    cells = [one for one in _part(record, "speed") if (one["shape"], one["context"], one["batch"]) == place]
    return sorted(cells, key=lambda one: ways.rank(one["way"]))


def measured(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those with a figure."""
    return [one for one in cells if "step_ms" in one or "row_step_ms" in one]


def reason(cell: dict[str, Any]) -> str:
    """Why a cell has no figure."""
    if "failed" in cell:
        return f"failed: {cell['failed']}"
    return cell["missing"] if "missing" in cell else f"out of memory: {cell['oom']}"


def best_stock(cells: list[dict[str, Any]]) -> float | None:
    """Milliseconds of stock, by whichever of its attention on a device is faster; None where it was not measured."""
    times = [one["step_ms"] for one in measured(cells) if one["way"] in ("stock", ways.FOLDED)]
    return min(times, default=None)


def equal(record: dict[str, Any]) -> dict[tuple[int, float | None], list[dict[str, Any]]]:
    """Cells of equal memory by context and GiB (None: what one stock row holds), the fastest first."""
    groups: dict[tuple[int, float | None], list[dict[str, Any]]] = {}
    for one in _part(record, "equal"):
        groups.setdefault((one["context"], one.get("gib")), []).append(one)
    return {key: sorted(measured(cells), key=lambda one: -one["tokens_per_s"]) for key, cells in groups.items()}


def equal_cells(record: dict[str, Any], context: int, gib: float | None) -> list[dict[str, Any]]:
    """All cells of one context and memory, with a figure or without."""
    return [one for one in _part(record, "equal") if (one["context"], one.get("gib")) == (context, gib)]


def scores(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row per way and budget: share of right answers over all tasks, and the means of the rest."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in measured(_part(record, "score")):
        groups.setdefault((one["way"], one["budget"]), []).append(one)
    for (way, budget), cells in sorted(groups.items(), key=lambda item: (ways.rank(item[0][0]), item[0][1])):
        right, asked = (sum(one[name] for one in cells) for name in ("right", "questions"))
        mean = {name: sum(one[name] for one in cells) / len(cells) for name in ("row_step_ms", "prefill_s")}
        held = {name: cells[0][name] for name in ("exact", "context")}
        tasks = {one["task"]: one["right"] / one["questions"] for one in cells}
        yield {"way": way, "budget": budget, "right": right, "questions": asked, "tasks": tasks} | mean | held


def score_of(record: dict[str, Any], way: str, share: float = 0.125) -> str:
    """Right answers of a way at one share of the context, in per cent, or a dash."""
    way = ways.SAME_ANSWERS.get(way, way)
    for one in scores(record):
        if one["way"] == way and one["budget"] in (one["context"], int(share * one["context"])):
            return f"{one['right'] / one['questions']:.0%}".replace("%", " %")
    return NONE


def unasked(record: dict[str, Any]) -> str:
    """Which ways gave a trained model no answers, and why."""
    told = {one["way"]: reason(one) for one in _part(record, "score") if one not in measured([one])}
    return f"Not asked: {'; '.join(f'{way}: {why}' for way, why in told.items())}." if told else ""


def predicted(record: dict[str, Any]) -> str:
    """What tells scout as shipped and the paper's rule apart; empty where only one was timed."""
    if not {"scout", ways.PREDICTED} <= {one["way"] for one in measured(_part(record, "speed"))}:
        return ""
    return (
        f"`{ways.PREDICTED}`, and what lacks a part of it, is the paper's rule: the CPU always attends ahead with the "
        "predicted query. `scout`, as shipped, does so where that query is seen to change little, which with random "
        "weights is hardly anywhere."
    )


def faster(ratio: float) -> str:
    """How much, in words."""
    return f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} times slower"


def emulated(record: dict[str, Any]) -> str:
    """What was emulated, in words."""
    rates = record["settings"]["emulation"]
    told = [f"{RATES[name]} at {rate:g} GB/s" for name, rate in rates.items() if rate is not None]
    return f"emulated: {', '.join(told)} ({record['settings']['emulated_as']})" if told else "nothing is emulated"


def emulated_sentence(record: dict[str, Any]) -> str:
    """The same as a sentence."""
    text = emulated(record)
    return f"{text[:1].upper()}{text[1:]}."


def mib(count: float) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:.0f}" if count >= 10 * 2**20 else f"{count / 2**20:.1f}"


def _part(record: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return [one for one in record["cells"] if one["part"] == part]
