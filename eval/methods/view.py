"""A record of the comparison as rows and words that tables, plots and pages show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from scout_hf.eval import arms
from scout_hf.eval.tables import NONE, by, short

Cell, Record = dict[str, Any], dict[str, Any]
NEARLY = 0.9
RATES = {"link_gbps": "link", "cpu_gbps": "CPU"}
SHAPE_NAMES = {"gqa": "32 query and 8 KV heads of 64", "mha": "32 query and 32 KV heads of 64"}


class Place(NamedTuple):
    """Cells that may be compared: one shape, context and batch."""

    shape: str
    context: int
    batch: int

    def __str__(self) -> str:
        return f"{short(self.context)} tokens, batch {self.batch}"


# -- cells ----------------------------------------------------------------------------------------------------------


def places(record: Record, shape: str | None = None) -> list[Place]:
    """Places of the record, of one shape or all, in the order of shape, batch and context."""
    found = {Place(one["shape"], one["context"], one["batch"]) for one in _part(record, "speed")}
    return sorted(
        (place for place in found if shape in (None, place.shape)),
        key=lambda place: (place.shape, place.batch, place.context),
    )


def at(record: Record, place: Place | None) -> list[Cell]:
    """The cells of a place, in the order of arms."""
    cells = [one for one in _part(record, "speed") if (one["shape"], one["context"], one["batch"]) == place]
    return sorted(cells, key=lambda one: arms.rank(one["way"]))


def measured(cells: list[Cell]) -> list[Cell]:
    """Those with a figure."""
    return [one for one in cells if "step_ms" in one or "row_step_ms" in one]


def figures_of(record: Record, place: Place | None, name: str = "tokens_per_s") -> dict[str, float]:
    """One figure of every way that was measured at a place."""
    return {one["way"]: one[name] for one in measured(at(record, place))}


def widest(record: Record, shape: str) -> Place | None:
    """The longest context of a shape at which nearly as many ways were measured as anywhere."""
    counts = {place: len(measured(at(record, place))) for place in places(record, shape)}
    wide = [place for place, count in counts.items() if count >= NEARLY * max(counts.values())]
    return max(wide, key=lambda place: (place.context, counts[place]), default=None)


def best_stock(cells: list[Cell]) -> float | None:
    """Milliseconds of stock, by whichever of its attention on a device is faster; None where it was not measured."""
    return min((one["step_ms"] for one in measured(cells) if one["way"] in ("stock", arms.FOLDED)), default=None)


def equal(record: Record) -> dict[tuple[int, float | None], list[Cell]]:
    """Cells of equal memory by context and GiB (None: what one stock row holds), the fastest first."""
    groups = by(_part(record, "equal"), lambda one: (one["context"], one.get("gib")))
    return {key: sorted(cells, key=lambda one: -one.get("tokens_per_s", 0.0)) for key, cells in groups.items()}


def scores(record: Record) -> Iterator[Cell]:
    """One row per way and budget: share of right answers over all tasks, and the means of the rest."""
    groups = by(measured(_part(record, "score")), lambda one: (one["way"], one["budget"]))
    for (way, budget), cells in sorted(groups.items(), key=lambda item: (arms.rank(item[0][0]), item[0][1])):
        total = {name: sum(one[name] for one in cells) for name in ("right", "questions")}
        mean = {name: sum(one[name] for one in cells) / len(cells) for name in ("row_step_ms", "prefill_s")}
        held = {name: cells[0][name] for name in ("exact", "context")}
        tasks = {one["task"]: one["right"] / one["questions"] for one in cells}
        yield (
            {"way": way, "budget": budget, "tasks": tasks, "share": total["right"] / total["questions"]}
            | total
            | mean
            | held
        )


def score_of(record: Record, way: str, share: float = 0.125) -> str:
    """Right answers of a way at one share of the context, in per cent, or a dash."""
    way = arms.SAME_ANSWERS.get(way, way)
    for one in scores(record):
        if one["way"] == way and one["budget"] in (one["context"], int(share * one["context"])):
            return f"{one['share']:.0%}".replace("%", " %")
    return NONE


def _part(record: Record, part: str) -> list[Cell]:
    return [one for one in record["cells"] if one["part"] == part]


# -- words ----------------------------------------------------------------------------------------------------------


def main_shape(record: Record) -> str:
    """The shape that most was measured with."""
    return record["settings"].get("shape", "gqa")


def shape_name(record: Record, shape: str) -> str:
    """In words."""
    if shape in SHAPE_NAMES:
        return SHAPE_NAMES[shape]
    facts, name = record.get("models", {}).get(shape), Path(shape).name
    if not facts:
        return name
    heads = f"{facts['num_attention_heads']} query and {facts['num_key_value_heads']} KV heads of {facts['head_dim']}"
    return f"{name}, {heads}"


def layers_of(record: Record, shape: str) -> int:
    """Of the model of that shape."""
    return record.get("models", {}).get(shape, {}).get("num_hidden_layers", record["settings"]["layers"])


def model_of(record: Record, shape: str) -> str:
    """The model of that shape in words."""
    name, layers = shape_name(record, shape), layers_of(record, shape)
    if shape not in SHAPE_NAMES:
        return f"{name}, {layers} layers"
    return f"{record['settings']['layers']} layers of Llama 3.2 1B's shape with random weights, {name}"


def reason(cell: Cell) -> str:
    """Why a cell has no figure."""
    if "failed" in cell:
        return f"failed: {cell['failed']}"
    return cell["missing"] if "missing" in cell else f"out of memory: {cell['oom']}"


def without(cells: list[Cell]) -> str:
    """Which ways have no figure, and why."""
    told = [f"{one['way']}: {reason(one)}" for one in cells if not measured([one])]
    return f"Not measured: {'; '.join(told)}." if told else ""


def unasked(record: Record) -> str:
    """Which ways gave a trained model no answers, and why."""
    told = {one["way"]: reason(one) for one in _part(record, "score") if not measured([one])}
    return f"Not asked: {'; '.join(f'{way}: {why}' for way, why in told.items())}." if told else ""


def predicted(record: Record) -> str:
    """What tells scout as shipped and the paper's rule apart; empty where only one was timed."""
    if not {"scout", arms.PREDICTED} <= {one["way"] for one in measured(_part(record, "speed"))}:
        return ""
    return (
        f"`{arms.PREDICTED}`, and what lacks a part of it, is the paper's rule: the CPU always attends ahead with the "
        "predicted query. `scout`, as shipped, does so where that query is seen to change little, which with random "
        "weights is hardly anywhere."
    )


def faster(ratio: float) -> str:
    """How much, in words."""
    return f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} times slower"


def emulated(record: Record, why: bool = True) -> str:
    """What was emulated, in words, and where the rates come from."""
    rates = record["settings"]["emulation"]
    told = ", ".join(f"{RATES[name]} at {rate:g} GB/s" for name, rate in rates.items() if rate is not None)
    source = f" ({record['settings']['emulated_as']})" if why else ""
    return f"emulated: {told}{source}" if told else "nothing is emulated"


def emulated_sentence(record: Record) -> str:
    """The same as a sentence."""
    text = emulated(record)
    return f"{text[:1].upper()}{text[1:]}."
