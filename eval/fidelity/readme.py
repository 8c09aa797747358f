"""The README's table of what is lost, made from the JSON of a study, between two marks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from scout_hf.eval.fidelity.cells import budget_name
from scout_hf.eval.fidelity.summary import Row, rows
from scout_hf.eval.fidelity.tables import percent, score
from scout_hf.eval.fidelity.views import AXES, CENTRE, along, digests, full_at, methods_at, points, rows_at
from scout_hf.eval.markdown import head, line

COMMAND = "scout-hf fidelity"
NAMES = {"oracle": "the best blocks there are", "random": "random blocks", "recent": "most recent blocks"}
QUERIES = {
    "real": "real, one tier",
    "real-int8": 'real, one tier, `host_dtype="int8"`',
    "real-two-tiers": "real, two tiers",
    "predicted": 'predicted, `cpu_query="predicted"`',
    "predicted-auto": 'predicted, `cpu_query="auto"` (the default)',
    "predicted-real-cpu": 'predicted, `cpu_query="real"`',
    "predicted-no-recall": 'predicted, `cpu_query="predicted"`, `recall=None`',
}
HOW = {
    "dense": "real, exact",
    "kvpr": "real, exact",
    "infinigen": "predicted, single tokens",
    "hgca": "real, window and kept",
}
"""How other methods attend."""

SWEPT = {"real": "one tier", "predicted-auto": "two tiers", "predicted": 'two tiers with `cpu_query="predicted"`'}


def markdown(record: dict[str, Any]) -> str:
    """The part between the marks: the centre in detail, then budgets, contexts and stress as far as measured."""
    asked, text = rows(record["cells"], text=False), rows(record["cells"], text=True)
    parts = [_centre(asked), *(_sweep(asked, axis, False) for axis in AXES)]
    parts += [_sweep(text, axis, True) for axis in ("budget", "tokens", "fixed")]
    return "\n\n".join("\n".join(lines) for lines in map(list, parts) if lines)


def _centre(table: Sequence[Row]) -> Iterator[str]:
    part, full = rows_at(table, CENTRE), full_at(table, CENTRE)
    if not part or full is None:
        return
    models, tasks = (", ".join(dict.fromkeys(one[name] for one in full.records)) for name in ("model", "task"))
    yield (
        f"{full.count} questions ({models}; {tasks}) on documents of {CENTRE['tokens']} tokens, blocks of "
        f"{CENTRE['block_size']}, budget {budget_name(CENTRE['budget'])}. In %, with standard errors over questions; "
        "losses are paired:"
    )
    yield ""
    yield from head("blocks by", "query", "right", "lost to selection", "lost to prediction", "read")
    yield line("full attention", "", score(full, False), "–", "–", "100 %")
    for row in part:
        setting = row.setting
        yield line(
            NAMES.get(setting["digest"], f"`{setting['digest']}`"),
            QUERIES[setting["mode"]],
            score(row, False),
            *("–" if loss is None else percent(loss) for loss in (row.lost_to_selection, row.lost_to_prediction)),
            f"{row.attended_share:.0%}".replace("%", " %"),
        )
    for row in methods_at(table, CENTRE):
        mode = row.setting["mode"]
        yield line(
            f'`method="{mode}"`',
            HOW.get(mode, ""),
            score(row, False),
            "–" if row.lost_to_selection is None else percent(row.lost_to_selection),
            "–",
            f"{row.attended_share:.0%}".replace("%", " %"),
        )


def _sweep(table: Sequence[Row], axis: str, text: bool) -> Iterator[str]:
    """Accuracy or perplexity along a factor, if it was varied."""
    places = points(table, axis)
    if len(places) < 2:
        return
    found = {(of, mode): along(table, axis, of, mode) for of in digests(table) for mode in SWEPT}
    found = {pair: of for pair, of in found.items() if len(of) > 1}
    shown = [mode for mode in SWEPT if any(mode == other for _, other in found)]
    if not shown:
        return
    what = "Perplexity of held-out text" if text else "Right, in %,"
    yield f"{what} by {AXES[axis]}, {' / '.join(SWEPT[mode] for mode in shown)}:"
    yield ""
    yield from head("blocks by", *(name for name, _ in places))
    yield line("full attention", *(_short(full_at(table, setting), text) for _, setting in places))
    for digest in dict.fromkeys(digest for digest, _ in found):
        of = [found.get((digest, mode), {}) for mode in shown]
        cells = (" / ".join(_short(one.get(name), text) for one in of) for name, _ in places)
        yield line(NAMES.get(digest, f"`{digest}`"), *cells)


def _short(row: Row | None, text: bool) -> str:
    if row is None:
        return "–"
    return f"{row.score.value:.2f}" if text else f"{100 * row.score.value:.1f}"
