"""The comparison as tables for a terminal, and as the README's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scout_hf.eval.bench.formats import new_table, short, three
from scout_hf.eval.markdown import head, line
from scout_hf.eval.methods import view

COMMAND = "scout-hf bench methods"
COLUMNS = ("step ms", "x stock", "device MiB", "host MiB", "link MB", "wait ms")


def tables(record: dict[str, Any]):
    """For a terminal: one table per place, then the scores."""
    for place in view.places(record):
        title = f"{view.SHAPE_NAMES[place.shape]}, {short(place.context)} tokens, batch {place.batch}"
        table = new_table(title, "way", *COLUMNS)
        cells = view.at(record, place)
        for one in view.measured(cells):
            table.add_row(_name(one), *figures(one, cells))
        yield table
        yield _without(cells)
    yield "\n".join(equal_memory(record))
    yield view.emulated(record)
    rows = list(view.scores(record))
    if rows:
        tasks = list(rows[0]["tasks"])
        table = new_table("a trained model's answers", "way", "budget", *tasks, "ms per row", "device MiB")
        for one in rows:
            shares = [f"{one['tasks'].get(task, 0):.0%}" for task in tasks]
            size = [three(one["row_step_ms"]), view.mib(one["device_bytes"])]
            table.add_row(_name(one), short(one["budget"]), *shares, *size)
        yield table


def row(record: dict[str, Any], one: dict[str, Any], cells: list[dict[str, Any]]) -> list[str]:
    """A cell as the main table has it."""
    return [one["way"], "yes" if one["exact"] else "no", view.score_of(record, one["way"]), *figures(one, cells)]


def figures(one: dict[str, Any], cells: list[dict[str, Any]]) -> list[str]:
    """A cell's figures in the order of ``COLUMNS``."""
    stock = [other["step_ms"] for other in view.measured(cells) if other["way"] == "stock"]
    return [
        three(one["step_ms"]),
        f"{stock[0] / one['step_ms']:.2f}" if stock else "-",
        view.mib(one["device_bytes"]),
        view.mib(one["host_bytes"]),
        three(one["link_bytes"] / 1e6) if "link_bytes" in one else "-",
        three(one["join_ms"]) if "join_ms" in one else "-",
    ]


def lines(record: dict[str, Any]) -> Iterator[str]:
    """The README's part: the longest context that all ways were measured at, then throughput by context."""
    yield from _speed(record)
    yield ""
    yield from further(record)


def further(record: dict[str, Any]) -> Iterator[str]:
    """Beside the main table: models without GQA, throughput by context, equal memory."""
    for number, part in enumerate((_mha(record), _order(record), equal_memory(record))):
        yield from [""] * bool(number)
        yield from part


def _speed(record: dict[str, Any]) -> Iterator[str]:
    place = widest(record, "gqa")
    if place is None:
        return
    cells = view.at(record, place)
    settings, facts = record["settings"], record["machine"]
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
    model = f"{settings['layers']} layers of Llama 3.2 1B's shape with random weights, {view.SHAPE_NAMES[place.shape]}"
    yield (
        f"{facts['cpu']}, {versions}, {settings['threads']} thread(s) for the model and as many for the CPU's share. "
        f"{model}, {short(place.context)} tokens, batch {place.batch}, budget {settings['budget']}; "
        f"{settings['drift']:.0%} of scout's chosen blocks change per step, synthetically. {view.emulated(record)}. "
        "Scores: right answers of the pocket model at 4k, budget 512, with nothing emulated."
    )
    yield ""
    yield from head("way", "exact", "right", *COLUMNS)
    for one in view.measured(cells):
        yield line(*row(record, one, cells))
    if without := _without(cells):
        yield ""
        yield without


def _mha(record: dict[str, Any]) -> Iterator[str]:
    place = widest(record, "mha")
    if place is None:
        return
    by_way = {one["way"]: one for one in view.measured(view.at(record, place))}
    if "kvpr" in by_way and "dense" in by_way:
        ratio = by_way["dense"]["step_ms"] / by_way["kvpr"]["step_ms"]
        yield (
            f"Without GQA ({view.SHAPE_NAMES['mha']}, {short(place.context)} tokens, batch {place.batch}) `kvpr` "
            f"takes {by_way['kvpr']['step_ms']:.0f} ms a step and `dense` {by_way['dense']['step_ms']:.0f}: "
            f"{ratio:.2f} times faster."
        )


def _order(record: dict[str, Any]) -> Iterator[str]:
    names = ("scout", "scout, no recall", "scout, neither", "hgca", "infinigen", "dense")
    rows = {}
    for place in view.places(record):
        if place.shape == "gqa":
            rows[place] = {one["way"]: one["tokens_per_s"] for one in view.measured(view.at(record, place))}
    if not rows:
        return
    yield "Tokens per second on the same emulated machine:"
    yield ""
    yield from head("tokens", *names)
    for place, found in rows.items():
        yield line(short(place.context), *(three(found[name]) if name in found else "–" for name in names))


def equal_memory(record: dict[str, Any]) -> Iterator[str]:
    """Throughput where every way has as many rows as fit into the device memory of one stock row."""
    cells = [one for one in record["cells"] if one["part"] == "equal" and "step_ms" in one]
    if not cells:
        return
    yield (
        f"In the device memory that one request of {short(cells[0]['context'])} tokens takes with stock, as many rows "
        "as fit (16 at most):"
    )
    yield ""
    yield from head("way", "rows", "tokens/s")
    for one in sorted(cells, key=lambda one: -one["tokens_per_s"]):
        yield line(one["way"], str(one["batch"]), three(one["tokens_per_s"]))


def widest(record: dict[str, Any], shape: str) -> view.Place | None:
    """The place of a shape with the most ways measured; of those the longest context."""
    found = [place for place in view.places(record) if place.shape == shape]
    return max(found, key=lambda place: (len(view.measured(view.at(record, place))), place.context), default=None)


def _without(cells: list[dict[str, Any]]) -> str:
    """Which ways have no figure, and why."""
    told = [f"{one['way']}: {view.reason(one)}" for one in cells if one not in view.measured(cells)]
    return f"Not measured: {'; '.join(told)}." if told else ""


def _name(one: dict[str, Any]) -> str:
    return one["way"] + (" (exact)" if one.get("exact") and one["way"] != "stock" else "")
