"""A study as tables: for a terminal of 80 columns in detail, and for Markdown; one factor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from scout_hf.eval.fidelity.cells import FULL, METHODS, budget_name
from scout_hf.eval.fidelity.summary import (
    AXES,
    CENTRE,
    Estimate,
    Row,
    along,
    digests,
    full_at,
    methods_at,
    points,
    rows,
    rows_at,
    settings,
)  # fmt: skip
from scout_hf.eval.tables import NONE, Grid

COMMAND = "scout-hf fidelity"
NAMES = {
    FULL: "full attention",
    "real": "real",
    "real-int8": "real, int8 KV",
    "real-two-tiers": "real, two tiers",
    "predicted": "predicted",
    "predicted-auto": "pred., auto on CPU",
    "predicted-real-cpu": "pred., real on CPU",
    "predicted-no-recall": "pred., no recall",
    **{name: f"method {name}" for name in METHODS},
}
"""Which query chose and attended; ``predicted-auto`` is as shipped."""

LONG_NAMES = {
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

DIGESTS = {"oracle": "the best blocks there are", "random": "random blocks", "recent": "most recent blocks"}
SWEPT = {"real": "one tier", "predicted-auto": "two tiers", "predicted": 'two tiers with `cpu_query="predicted"`'}
"""Modes shown along a factor; of the first what selection loses is told too, of the others what prediction does."""

NOTE = """\
Lost to selection: full attention less the real query on as many tiers. Lost to prediction: the real query on two \
tiers less the predicted one. In points (perplexity: in % of it), over the same questions, with standard errors. Read: \
tokens attended per step; two tiers add residents that were not chosen. tok/s: one thread, up to 32 rows together."""

MOST_DETAILED = 3


# -- a terminal -----------------------------------------------------------------------------------------------------


def tables(record: dict[str, Any]) -> Iterator[Grid]:
    """First what was measured at the centre, in detail, then a table per factor; questions before text."""
    for text in (False, True):
        found = rows(record["cells"], text)
        places = settings(found)
        for setting in places if len(places) <= MOST_DETAILED else places[:1]:
            yield _detail(found, setting, text)
        if not places and found:
            # Nothing but full attention was measured.
            table = Grid(_what(found[0], text), ("tokens", "stress", _score_name(text)), 2, tight=True)
            table.rows = [(str(row.setting["tokens"]), row.setting["stress"], _score(row, text)) for row in found]
            yield table
        yield from (_sweep(found, axis, text) for axis in AXES if len(points(found, axis)) > 1)


def _detail(found: Sequence[Row], setting: dict[str, Any], text: bool) -> Grid:
    part, full = [*rows_at(found, setting), *methods_at(found, setting)], full_at(found, setting)
    names = ("blocks by", "query", _score_name(text), "lost to\nselect.", "lost to\npredict.", "read", "tok/s")
    table, before = Grid(f"{_place(setting)}: {_what(part[0], text)}", names, 2, tight=True), None
    for row in [full, *part] if full else part:
        digest = row.setting["digest"]
        table.add(
            "" if digest == before else digest or "-",
            NAMES[row.setting["mode"]],
            _score(row, text),
            _percent(row.lost_to_selection),
            _percent(row.lost_to_prediction),
            f"{row.attended_share:.1%}",
            f"{row.tokens_per_second:.0f}",
            end=row is full,
        )
        before = digest
    return table


def _sweep(found: Sequence[Row], axis: str, text: bool) -> Grid:
    names = [name for name, _ in points(found, axis)]
    title = f"{_score_name(text)} by {AXES[axis]}; else {_place(CENTRE)}"
    table = Grid(title, ("blocks by", "query", *names), 2, tight=True)
    full = (full_at(found, setting) for _, setting in points(found, axis))
    table.add("", NAMES[FULL], *(_score(row, text) if row else "" for row in full), end=True)
    for digest, modes in _along(found, axis).items():
        lines = []
        for mode, of in modes.items():
            lines.append((NAMES[mode], *(_score(of[name], text) if name in of else "" for name in names)))
            loss = "selection" if mode == "real" else "prediction"
            losses = (_percent(getattr(of.get(name), f"lost_to_{loss}", None)) for name in names)
            lines.append((f"lost: {loss}", *losses))
        for index, line in enumerate(lines):
            table.add("" if index else digest, *line, end=index == len(lines) - 1)
    return table


def _along(table: Sequence[Row], axis: str) -> dict[str, dict[str, dict[str, Row]]]:
    """Rows along a factor by digest, mode and name of the point, where there are several."""
    found = {digest: {mode: along(table, axis, digest, mode) for mode in SWEPT} for digest in digests(table)}
    found = {digest: {mode: of for mode, of in modes.items() if len(of) > 1} for digest, modes in found.items()}
    return {digest: modes for digest, modes in found.items() if modes}


def _place(setting: dict[str, Any]) -> str:
    place = f"{setting['tokens']} tokens, block {setting['block_size']}, budget {budget_name(setting['budget'])}"
    return place if setting["stress"] == "none" else f"{place}, stress {setting['stress']}"


def _subjects(row: Row) -> list[str]:
    return [", ".join(dict.fromkeys(one[name] for one in row.records)) for name in ("model", "task")]


def _what(row: Row, text: bool) -> str:
    return f"perplexity over {row.count} texts" if text else f"{row.count} questions ({': '.join(_subjects(row))})"


def _score_name(text: bool) -> str:
    return "perplexity" if text else "right, %"


def _score(row: Row, text: bool) -> str:
    """Accuracy in %, with its standard error; perplexity without, since its spread is that between texts."""
    return f"{row.score.value:.3f}" if text else _percent(row.score)


def _percent(value: Estimate | None, none: str = "-") -> str:
    """In % and with its standard error."""
    return none if value is None else f"{100 * value.value:.1f}±{100 * value.error:.1f}"


# -- Markdown -------------------------------------------------------------------------------------------------------


def parts(record: dict[str, Any]) -> Iterator[Grid | str]:
    """The centre in detail, then budgets, contexts and stress as far as measured."""
    asked, text = rows(record["cells"], text=False), rows(record["cells"], text=True)
    yield from _centre(asked)
    for axis in AXES:
        yield from _swept(asked, axis, False)
    for axis in ("budget", "tokens", "fixed"):
        yield from _swept(text, axis, True)


def _centre(table: Sequence[Row]) -> Iterator[Grid | str]:
    part, full = rows_at(table, CENTRE), full_at(table, CENTRE)
    if not part or full is None:
        return
    yield (
        f"{full.count} questions ({'; '.join(_subjects(full))}) on documents of {CENTRE['tokens']} tokens, blocks of "
        f"{CENTRE['block_size']}, budget {budget_name(CENTRE['budget'])}. In %, with standard errors over questions; "
        "losses are paired:"
    )
    shown = Grid("", ("blocks by", "query", "right", "lost to selection", "lost to prediction", "read"))
    shown.add("full attention", "", _score(full, False), NONE, NONE, "100 %")
    for row in [*part, *methods_at(table, CENTRE)]:
        mode = row.setting["mode"]
        losses = row.lost_to_selection, row.lost_to_prediction
        shown.add(
            f'`method="{mode}"`' if mode in METHODS else _digest(row.setting["digest"]),
            HOW.get(mode, "") if mode in METHODS else LONG_NAMES[mode],
            _score(row, False),
            *(_percent(loss, NONE) for loss in losses),
            f"{row.attended_share:.0%}".replace("%", " %"),
        )
    yield shown


def _swept(table: Sequence[Row], axis: str, text: bool) -> Iterator[Grid | str]:
    """Accuracy or perplexity along a factor, if it was varied."""
    found = _along(table, axis)
    shown = [mode for mode in SWEPT if any(mode in modes for modes in found.values())]
    if not shown:
        return

    def brief(row: Row | None) -> str:
        return NONE if row is None else f"{row.score.value:.2f}" if text else f"{100 * row.score.value:.1f}"

    what, places = "Perplexity of held-out text" if text else "Right, in %,", points(table, axis)
    yield f"{what} by {AXES[axis]}, {' / '.join(SWEPT[mode] for mode in shown)}:"
    grid = Grid("", ("blocks by", *(name for name, _ in places)))
    grid.add("full attention", *(brief(full_at(table, setting)) for _, setting in places))
    for digest, modes in found.items():
        of = [modes.get(mode, {}) for mode in shown]
        grid.add(_digest(digest), *(" / ".join(brief(one.get(name)) for one in of) for name, _ in places))
    yield grid


def _digest(name: str) -> str:
    return DIGESTS.get(name, f"`{name}`")
