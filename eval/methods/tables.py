"""The comparison as tables for a terminal, and as the README's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scout_hf.eval.bench.formats import new_table, short, three
from scout_hf.eval.markdown import head, line
from scout_hf.eval.methods import paper, view
from scout_hf.eval.methods.ways import ABLATIONS, FOLDED, KEPT, PREDICTED

COMMAND = "scout-hf bench methods"
NEARLY = 0.9
COLUMNS = ("step ms", "quartiles", "x stock", "device MiB", "host MiB", "link MB", "wait ms", "CPU ms")


def tables(record: dict[str, Any]):
    """For a terminal: one table per place, then the scores."""
    for place in view.places(record):
        title = f"{view.shape_name(record, place.shape)}, {short(place.context)} tokens, batch {place.batch}"
        table = new_table(title, "way", *COLUMNS)
        cells = view.at(record, place)
        for one in view.measured(cells):
            table.add_row(_name(one), *figures(one, cells))
        yield table
        yield without(cells)
    yield from equal_tables(record)
    yield from paper.sentences(record)
    yield view.emulated(record)
    rows = list(view.scores(record))
    if rows:
        tasks = list(rows[0]["tasks"])
        table = new_table("a trained model's answers", "way", "budget", *tasks, "ms per row")
        for one in rows:
            shares = [f"{one['tasks'].get(task, 0):.0%}" for task in tasks]
            table.add_row(_name(one), short(one["budget"]), *shares, three(one["row_step_ms"]))
        yield table
        yield view.unasked(record)


def equal_tables(record: dict[str, Any]):
    """Throughput in equal memory, a table per context and memory."""
    for (context, gib), cells in view.equal(record).items():
        table = new_table(f"{_memory(context, gib)}, {short(context)} tokens", "way", "rows", "tokens/s", "step ms")
        for one in cells:
            table.add_row(_name(one), str(one["batch"]), three(one["tokens_per_s"]), three(one["step_ms"]))
        yield table
        yield without(view.equal_cells(record, context, gib))


def row(record: dict[str, Any], one: dict[str, Any], cells: list[dict[str, Any]]) -> list[str]:
    """A cell as the main table has it."""
    return [one["way"], "yes" if one["exact"] else "no", view.score_of(record, one["way"]), *figures(one, cells)]


def figures(one: dict[str, Any], cells: list[dict[str, Any]]) -> list[str]:
    """A cell's figures in the order of ``COLUMNS``."""
    stock = view.best_stock(cells)
    return [
        three(one["step_ms"]),
        f"{three(one['q1_ms'])}–{three(one['q3_ms'])}",
        f"{stock / one['step_ms']:.2f}" if stock else "-",
        view.mib(one["device_bytes"]),
        view.mib(one["host_bytes"]),
        three(one["link_bytes"] / 1e6) if "link_bytes" in one else "-",
        three(one["join_ms"]) if "join_ms" in one else "-",
        three(one["cpu_ms"]) if "cpu_ms" in one else "-",
    ]


def lines(record: dict[str, Any]) -> Iterator[str]:
    """The README's part: the longest context that nearly all ways were measured at, then throughput by context."""
    yield from _speed(record)
    yield ""
    yield from further(record)


def further(record: dict[str, Any]) -> Iterator[str]:
    """Beside the main table: models without GQA, throughput by context, the paper's order, equal memory."""
    parts = [list(part) for part in (_mha(record), _order(record), _sentences(record), equal_memory(record))]
    for number, part in enumerate(part for part in parts if part):
        yield from [""] * bool(number)
        yield from part


def _sentences(record: dict[str, Any]) -> Iterator[str]:
    if told := " ".join(paper.sentences(record)):
        yield told


def _speed(record: dict[str, Any]) -> Iterator[str]:
    place = widest(record, view.main_shape(record))
    if place is None:
        return
    cells = view.at(record, place)
    settings, facts = record["settings"], record["machine"]
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
    yield (
        f"{facts['cpu']}, {versions}, {settings['threads']} thread(s) for the model and as many for the CPU's share. "
        f"{model_of(record, place)}, {short(place.context)} tokens, batch {place.batch}, budget {settings['budget']}; "
        f"{settings['drift']:.0%} of the chosen blocks (or tokens, of `{KEPT}`) change per step, synthetically. "
        f"{view.emulated_sentence(record)} "
        "Right: answers of the pocket model at 4k, budget 512, with nothing emulated. "
        "Step ms is the mean, with recalls, and x stock by it, than stock by its faster attention. "
        f"{view.predicted(record)}".rstrip()
    )
    yield ""
    yield from head("way", "exact", "right", *COLUMNS)
    for one in view.measured(cells):
        yield line(*row(record, one, cells))
    if told := " ".join(filter(None, (without(cells), view.unasked(record)))):
        yield ""
        yield told


def layers_of(record: dict[str, Any]) -> int:
    """Of the model that most was measured with."""
    known = record.get("models", {}).get(view.main_shape(record), {})
    return known.get("num_hidden_layers", record["settings"]["layers"])


def model_of(record: dict[str, Any], place: view.Place) -> str:
    """The model of a place in words."""
    name, layers = view.shape_name(record, place.shape), record["settings"]["layers"]
    known = record.get("models", {}).get(place.shape, {"num_hidden_layers": layers})["num_hidden_layers"]
    if place.shape in view.SHAPE_NAMES:
        return f"{layers} layers of Llama 3.2 1B's shape with random weights, {name}"
    return f"{name}, {known} layers"


def _mha(record: dict[str, Any]) -> Iterator[str]:
    place = widest(record, "mha")
    if place is None:
        return
    by_way = {one["way"]: one for one in view.measured(view.at(record, place))}
    if "kvpr" in by_way and "dense" in by_way:
        ours, dense = (by_way[way]["step_ms"] for way in ("kvpr", "dense"))
        yield (
            f"Without GQA ({view.SHAPE_NAMES['mha']}, {short(place.context)} tokens, batch {place.batch}) `kvpr` "
            f"takes {ours:.0f} ms a step and `dense` {dense:.0f}: {view.faster(dense / ours)}."
        )


def _order(record: dict[str, Any]) -> Iterator[str]:
    names = ("scout", PREDICTED, *ABLATIONS, "hgca", KEPT, "infinigen", "dense", "stock", FOLDED, "stock quantized")
    rows = {}
    for place in view.places(record):
        found = {one["way"]: one["tokens_per_s"] for one in view.measured(view.at(record, place))}
        if place.shape == view.main_shape(record) and any(name in found for name in names):
            rows[place] = found
    if not rows:
        return
    names = tuple(name for name in names if any(name in found for found in rows.values()))
    yield f"Tokens per second at equal batch ({view.emulated(record).partition(' (')[0]}):"
    yield ""
    yield from head("tokens", "batch", *names)
    for place, found in rows.items():
        cells = (three(found[name]) if name in found else "–" for name in names)
        yield line(short(place.context), str(place.batch), *cells)


def equal_memory(record: dict[str, Any]) -> Iterator[str]:
    """Throughput where every way has as many rows as fit into the same memory of the device."""
    for number, ((context, gib), cells) in enumerate(view.equal(record).items()):
        yield from [""] * bool(number)
        yield (
            f"{_memory(context, gib)}, as many rows of {short(context)} tokens as fit (16 at most). Buffers that "
            f"layers use in turn count whole: of {layers_of(record)} layers they are a larger part than of more."
        )
        yield ""
        yield from head("way", "rows", "tokens/s", "step ms")
        for one in cells:
            yield line(one["way"], str(one["batch"]), three(one["tokens_per_s"]), three(one["step_ms"]))
        if told := without(view.equal_cells(record, context, gib)):
            yield ""
            yield told


def _memory(context: int, gib: float | None) -> str:
    if gib is None:
        return f"In the device memory that one request of {short(context)} tokens takes with stock"
    return f"In {gib:g} GiB of the device, beside the weights"


def widest(record: dict[str, Any], shape: str) -> view.Place | None:
    """The longest context of a shape at which nearly as many ways were measured as anywhere."""
    ways = {place: len(view.measured(view.at(record, place))) for place in view.places(record) if place.shape == shape}
    wide = [place for place, count in ways.items() if count >= NEARLY * max(ways.values())]
    return max(wide, key=lambda place: (place.context, ways[place]), default=None)


def without(cells: list[dict[str, Any]]) -> str:
    """Which ways have no figure, and why."""
    told = [f"{one['way']}: {view.reason(one)}" for one in cells if one not in view.measured(cells)]
    return f"Not measured: {'; '.join(told)}." if told else ""


def _name(one: dict[str, Any]) -> str:
    return one["way"] + (" (exact)" if one.get("exact") and one["way"] != "stock" else "")
