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
    """Cells that may be compared: same shape, context and batch."""

    shape: str
    context: int
    batch: int

    def __str__(self) -> str:
        return f"{short(self.context)} tokens, batch {self.batch}"


# -- cells ----------------------------------------------------------------------------------------------------------


def places(record: Record, shape: str | None = None) -> list[Place]:
    """The places at which steps were timed, of one shape or of all, sorted by shape, batch and context."""
    found = {Place(one["shape"], one["context"], one["batch"]) for one in _part(record, "speed")}
    return sorted(
        (place for place in found if shape in (None, place.shape)),
        key=lambda place: (place.shape, place.batch, place.context),
    )


def at(record: Record, place: Place | None) -> list[Cell]:
    """The timed cells of one place in the order of arms; none for None."""
    cells = [one for one in _part(record, "speed") if (one["shape"], one["context"], one["batch"]) == place]
    return sorted(cells, key=lambda one: arms.rank(one["way"]))


def measured(cells: list[Cell]) -> list[Cell]:
    """The cells that have figures."""
    return [one for one in cells if "step_ms" in one or "row_step_ms" in one]


def figures_of(record: Record, place: Place | None, name: str = "tokens_per_s") -> dict[str, float]:
    """One figure, such as ``step_ms``, of every arm measured at a place, by its name."""
    return {one["way"]: one[name] for one in measured(at(record, place))}


def widest(record: Record, shape: str) -> Place | None:
    """The longest context of a shape at which nearly all arms were measured; None if nothing was."""
    counts = {place: len(measured(at(record, place))) for place in places(record, shape)}
    wide = [place for place, count in counts.items() if count >= NEARLY * max(counts.values())]
    return max(wide, key=lambda place: (place.context, counts[place]), default=None)


def best_stock(cells: list[Cell]) -> float | None:
    """Milliseconds per step of stock attention, folded or not, whichever is faster; None if not measured."""
    return min((one["step_ms"] for one in measured(cells) if one["way"] in ("stock", arms.FOLDED)), default=None)


def equal(record: Record) -> dict[tuple[int, float | None], list[Cell]]:
    """Cells at equal device memory, fastest first, by (context, GiB); None is the memory of one stock row."""
    groups = by(_part(record, "equal"), lambda one: (one["context"], one.get("gib")))
    return {key: sorted(cells, key=lambda one: -one.get("tokens_per_s", 0.0)) for key, cells in groups.items()}


def scores(record: Record) -> Iterator[Cell]:
    """Right answers of every arm and budget, summed over tasks; ``tasks`` has the share by task, times are means."""
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


def score_of(record: Record, way: str) -> str:
    """Right answers of an arm in per cent, at an eighth of the context; a dash if there are none."""
    way = arms.SAME_ANSWERS.get(way, way)
    for one in scores(record):
        if one["way"] == way and one["budget"] in (one["context"], int(0.125 * one["context"])):
            return f"{one['share']:.0%}".replace("%", " %")
    return NONE


def _part(record: Record, part: str) -> list[Cell]:
    return [one for one in record["cells"] if one["part"] == part]


# -- words ----------------------------------------------------------------------------------------------------------


def main_shape(record: Record) -> str:
    """The shape of most measurements."""
    return record["settings"].get("shape", "gqa")


def shape_name(record: Record, shape: str) -> str:
    """A shape in words, such as ``32 query and 8 KV heads of 64``."""
    if shape in SHAPE_NAMES:
        return SHAPE_NAMES[shape]
    facts, name = record.get("models", {}).get(shape), Path(shape).name
    if not facts:
        return name
    heads = f"{facts['num_attention_heads']} query and {facts['num_key_value_heads']} KV heads of {facts['head_dim']}"
    return f"{name}, {heads}"


def layers_of(record: Record, shape: str) -> int:
    """The number of layers of the model of a shape."""
    return record.get("models", {}).get(shape, {}).get("num_hidden_layers", record["settings"]["layers"])


def model_of(record: Record, shape: str) -> str:
    """The model of a shape in words, with its layers."""
    name, layers = shape_name(record, shape), layers_of(record, shape)
    if shape not in SHAPE_NAMES:
        return f"{name}, {layers} layers"
    return f"{record['settings']['layers']} layers of Llama 3.2 1B's shape with random weights, {name}"


def reason(cell: Cell) -> str:
    """Why a cell has no figures."""
    if "failed" in cell:
        return f"failed: {cell['failed']}"
    return cell["missing"] if "missing" in cell else f"out of memory: {cell['oom']}"


def without(cells: list[Cell]) -> str:
    """A sentence about the arms that were not measured, with the reasons; empty if all were."""
    reasons = [f"{one['way']}: {reason(one)}" for one in cells if not measured([one])]
    return f"Not measured: {'; '.join(reasons)}." if reasons else ""


def unasked(record: Record) -> str:
    """A sentence about the arms whose answers were not measured, with the reasons; empty if all were."""
    reasons = {one["way"]: reason(one) for one in _part(record, "score") if not measured([one])}
    return f"Not asked: {'; '.join(f'{way}: {why}' for way, why in reasons.items())}." if reasons else ""


def predicted(record: Record) -> str:
    """A sentence on the difference between ``scout`` and the paper's rule; empty unless both were timed."""
    if not {"scout", arms.PREDICTED} <= {one["way"] for one in measured(_part(record, "speed"))}:
        return ""
    return (
        f"`{arms.PREDICTED}`, and what lacks a part of it, is the paper's rule: the CPU always attends ahead with the "
        "predicted query. `scout`, as shipped, does so where that query is seen to change little, which with random "
        "weights is hardly anywhere."
    )


def faster(ratio: float) -> str:
    """A ratio above 0 in words.

    >>> faster(0.5)
    '2.00 times slower'
    """
    return f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} times slower"


def emulated(record: Record, why: bool = True) -> str:
    """The emulated rates in words and, where that is asked for, ``why`` they are these."""
    rates = record["settings"]["emulation"]
    shown = ", ".join(f"{RATES[name]} at {rate:g} GB/s" for name, rate in rates.items() if rate is not None)
    source = f" ({record['settings']['emulated_as']})" if why else ""
    return f"emulated: {shown}{source}" if shown else "nothing is emulated"


def emulated_sentence(record: Record) -> str:
    """As :func:`emulated`, as a sentence."""
    text = emulated(record)
    return f"{text[:1].upper()}{text[1:]}."
