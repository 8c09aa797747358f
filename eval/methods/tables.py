"""The comparison as tables and sentences: for a terminal, for Markdown, and beside the paper's own results.

ScoutAttention (arXiv 2603.27138) gives an order of methods (figure 8), and what each part of it brings (figure 12).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from scout_hf.eval.arms import ABLATIONS, FOLDED, KEPT, PREDICTED
from scout_hf.eval.methods import view
from scout_hf.eval.methods.view import Cell, Place, Record
from scout_hf.eval.tables import NONE, Grid, mib, short, three

COMMAND = "scout-hf bench methods"
COLUMNS = ("step ms", "quartiles", "x stock", "device MiB", "host MiB", "link MB", "wait ms", "CPU ms")
ORDER = (PREDICTED, "hgca", KEPT)
"""By decode throughput at every context, the highest first (figure 8)."""

ABLATION = (*reversed(ABLATIONS), PREDICTED)
GAINS = (1.39, 1.20)
"""What one layer ahead brings, and what recall brings on top (figure 12)."""

COMPARED = ("scout", PREDICTED, *ABLATIONS, "hgca", KEPT, "infinigen", "dense", "stock", FOLDED, "stock quantized")


def tables(record: Record) -> Iterator[Grid | str]:
    """For a terminal: one table per place, equal memory, what is said of the paper, then the scores."""
    for place in view.places(record):
        cells = view.at(record, place)
        table = Grid(f"{view.shape_name(record, place.shape)}, {place}", ("way", *COLUMNS))
        table.rows += [[_name(one), *_figures(one, cells)] for one in view.measured(cells)]
        yield table
        yield view.without(cells)
    for (context, gib), cells in view.equal(record).items():
        yield _equal(f"{_memory(context, gib)}, {short(context)} tokens", cells, _name)
        yield view.without(cells)
    yield from sentences(record)
    yield view.emulated(record)
    if rows := list(view.scores(record)):
        tasks = list(rows[0]["tasks"])
        table = Grid("a trained model's answers", ("way", "budget", *tasks, "ms per row"))
        for one in rows:
            shares = (f"{one['tasks'].get(task, 0):.0%}" for task in tasks)
            table.add(_name(one), short(one["budget"]), *shares, three(one["row_step_ms"]))
        yield table
        yield view.unasked(record)


def main(record: Record, place: Place, *names: str) -> Grid:
    """The table of a place, its first columns the way, whether it is exact, and its answers."""
    cells = view.at(record, place)
    table = Grid("", (*names, *COLUMNS))
    for one in view.measured(cells):
        exact = "yes" if one["exact"] else "no"
        table.add(one["way"], exact, view.score_of(record, one["way"]), *_figures(one, cells))
    return table


def parts(record: Record) -> Iterator[Grid | str]:
    """For Markdown: the longest context that nearly all ways were measured at, then notes on it."""
    place = view.widest(record, view.main_shape(record))
    if place is not None:
        settings, facts = record["settings"], record["machine"]
        yield (
            f"{facts['cpu']}, torch {facts['torch']}, transformers {facts['transformers']}, {settings['threads']} "
            "thread(s) for the model and as many for the CPU's share. "
            f"{view.model_of(record, place.shape)}, {place}, budget {settings['budget']}; "
            f"{settings['drift']:.0%} of the chosen blocks (or tokens, of `{KEPT}`) change per step, synthetically. "
            f"{view.emulated_sentence(record)} "
            "Right: answers of the pocket model at 4k, budget 512, with nothing emulated. "
            "Step ms is the mean, with recalls, and x stock by it, than stock by its faster attention. "
            f"{view.predicted(record)}".rstrip()
        )
        yield main(record, place, "way", "exact", "right")
        if notes := " ".join(filter(None, (view.without(view.at(record, place)), view.unasked(record)))):
            yield notes
    yield from further(record)


def further(record: Record) -> Iterator[Grid | str]:
    """Beside the main table: models without GQA, throughput by context, the paper's order, equal memory."""
    place = view.widest(record, "mha")
    times = view.figures_of(record, place, "step_ms")
    if "kvpr" in times and "dense" in times:
        yield (
            f"Without GQA ({view.SHAPE_NAMES['mha']}, {place}) `kvpr` takes {times['kvpr']:.0f} ms a step and `dense` "
            f"{times['dense']:.0f}: {view.faster(times['dense'] / times['kvpr'])}."
        )
    rows = {place: view.figures_of(record, place) for place in view.places(record, view.main_shape(record))}
    if names := [name for name in COMPARED if any(name in found for found in rows.values())]:
        yield f"Tokens per second at equal batch ({view.emulated(record, why=False)}):"
        table = Grid("", ("tokens", "batch", *names))
        for place, found in rows.items():
            if any(name in found for name in names):
                cells = (three(found[name]) if name in found else NONE for name in names)
                table.add(short(place.context), str(place.batch), *cells)
        yield table
    if notes := " ".join(sentences(record)):
        yield notes
    for (context, gib), cells in view.equal(record).items():
        yield (
            f"{_memory(context, gib)}, as many rows of {short(context)} tokens as fit (16 at most). Buffers that "
            f"layers use in turn count whole: of {view.layers_of(record, view.main_shape(record))} layers they are a "
            "larger part than of more."
        )
        yield _equal("", cells, lambda one: one["way"])
        if notes := view.without(cells):
            yield notes


def sentences(record: Record) -> Iterator[str]:
    """One on each result of the paper, for the longest context that all of its ways were timed at."""
    if found := _longest(record, ORDER):
        place, speed = found
        names = sorted(ORDER, key=lambda name: -speed[name])
        speeds = "; ".join(f"{name} {three(speed[name])}" for name in names)
        order = "the order" if tuple(names) == ORDER else f"not the order ({'; '.join(ORDER)})"
        yield (
            f"At {short(place.context)} tokens and batch {place.batch} tokens/s are {speeds}: {order} of the paper's "
            "figure 8."
        )
        if (stock := view.best_stock(view.at(record, place))) and stock < 1e3 * place.batch / speed[names[-1]]:
            yield (
                f"Stock, {three(1e3 * place.batch / stock)}, holds all KV on the device at the same batch; in the "
                "paper memory keeps its batch small, and it is last."
            )
    if found := _longest(record, ABLATION):
        place, speed = found
        ahead, recall = (speed[after] / speed[before] for before, after in zip(ABLATION, ABLATION[1:]))
        yield (
            f"Of scout's parts, at {short(place.context)} tokens, one layer ahead makes it {view.faster(ahead)}, "
            f"recall another {view.faster(recall)}; on the paper's machine {GAINS[0]:.2f} and {GAINS[1]:.2f} times "
            "(figure 12)."
        )


def _longest(record: Record, names: tuple[str, ...]) -> tuple[Place, dict[str, float]] | None:
    for place in sorted(view.places(record, view.main_shape(record)), key=lambda one: (-one.context, -one.batch)):
        speed = view.figures_of(record, place)
        if all(name in speed for name in names):
            return place, speed
    return None


def _figures(one: Cell, cells: list[Cell]) -> list[str]:
    """A cell's figures in the order of ``COLUMNS``."""
    stock = view.best_stock(cells)
    return [
        three(one["step_ms"]),
        f"{three(one['q1_ms'])}–{three(one['q3_ms'])}",
        f"{stock / one['step_ms']:.2f}" if stock else "-",
        mib(one["device_bytes"]),
        mib(one["host_bytes"]),
        three(one["link_bytes"] / 1e6 if "link_bytes" in one else None),
        three(one.get("join_ms")),
        three(one.get("cpu_ms")),
    ]


def _equal(title: str, cells: list[Cell], name: Callable[[Cell], str]) -> Grid:
    table = Grid(title, ("way", "rows", "tokens/s", "step ms"))
    for one in view.measured(cells):
        table.add(name(one), str(one["batch"]), three(one["tokens_per_s"]), three(one["step_ms"]))
    return table


def _memory(context: int, gib: float | None) -> str:
    if gib is None:
        return f"In the device memory that one request of {short(context)} tokens takes with stock"
    return f"In {gib:g} GiB of the device, beside the weights"


def _name(one: dict[str, Any]) -> str:
    return one["way"] + (" (exact)" if one.get("exact") and one["way"] != "stock" else "")
