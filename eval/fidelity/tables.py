"""A study as tables for a terminal of 80 columns: settings in detail, and one factor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from scout_hf.eval.fidelity.cells import FULL, METHODS, budget_name
from scout_hf.eval.fidelity.summary import Estimate, Row, rows
from scout_hf.eval.fidelity.views import AXES, CENTRE, along, digests, full_at, methods_at, points, rows_at, settings

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

SWEPT = {"real": "lost_to_selection", "predicted-auto": "lost_to_prediction", "predicted": "lost_to_prediction"}
"""Modes shown along a factor, and which loss each adds."""

NOTE = """\
Lost to selection: full attention less the real query on as many tiers. Lost to prediction: the real query on two \
tiers less the predicted one. In points (perplexity: in % of it), over the same questions, with standard errors. Read: \
tokens attended per step; two tiers add residents that were not chosen. tok/s: one thread, up to 32 rows together."""

MOST_DETAILED = 3


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """First what was measured at the centre, in detail, then a table per factor; questions before text."""
    for text in (False, True):
        found = rows(record["cells"], text)
        places = settings(found)
        for setting in places if len(places) <= MOST_DETAILED else places[:1]:
            yield _detail(found, setting, text)
        if not places and found:
            yield _plain(found, text)
        for axis in AXES:
            if len(points(found, axis)) > 1:
                yield _sweep(found, axis, text)


def _detail(found: Sequence[Row], setting: dict[str, Any], text: bool) -> Table:
    part, full = [*rows_at(found, setting), *methods_at(found, setting)], full_at(found, setting)
    table = _table(f"{_place(setting)}: {_what(part[0], text)}", "blocks by", "query", words=2)
    for name in (_score_name(text), "lost to\nselect.", "lost to\npredict.", "read", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in [full, *part] if full else part:
        digest = row.setting["digest"]
        table.add_row(
            "" if digest == before else digest or "-",
            NAMES[row.setting["mode"]],
            score(row, text),
            percent(row.lost_to_selection),
            percent(row.lost_to_prediction),
            f"{row.attended_share:.1%}",
            f"{row.tokens_per_second:.0f}",
            end_section=row is full,
        )
        before = digest
    return table


def _plain(found: Sequence[Row], text: bool) -> Table:
    """Nothing but full attention was measured."""
    table = _table(_what(found[0], text), "tokens", "stress", words=2)
    table.add_column(_score_name(text), justify="right")
    for row in found:
        table.add_row(str(row.setting["tokens"]), row.setting["stress"], score(row, text))
    return table


def _sweep(found: Sequence[Row], axis: str, text: bool) -> Table:
    names = [name for name, _ in points(found, axis)]
    table = _table(f"{_score_name(text)} by {AXES[axis]}; else {_place(CENTRE)}", "blocks by", "query", words=2)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    full = [full_at(found, setting) for _, setting in points(found, axis)]
    table.add_row("", NAMES[FULL], *(score(row, text) if row else "" for row in full), end_section=True)
    for digest in digests(found):
        lines = []
        for mode, loss in SWEPT.items():
            of = along(found, axis, digest, mode)
            if len(of) > 1:
                lines.append((NAMES[mode], [score(of[name], text) if name in of else "" for name in names]))
                losses = [percent(getattr(of.get(name), loss, None)) for name in names]
                lines.append((loss.replace("_to_", ": "), losses))
        for index, (name, line) in enumerate(lines):
            table.add_row("" if index else digest, name, *line, end_section=index == len(lines) - 1)
    return table


def _place(setting: dict[str, Any]) -> str:
    place = f"{setting['tokens']} tokens, block {setting['block_size']}, budget {budget_name(setting['budget'])}"
    return place if setting["stress"] == "none" else f"{place}, stress {setting['stress']}"


def _what(row: Row, text: bool) -> str:
    models, tasks = (", ".join(dict.fromkeys(one[name] for one in row.records)) for name in ("model", "task"))
    return f"perplexity over {row.count} texts" if text else f"{row.count} questions ({models}: {tasks})"


def _score_name(text: bool) -> str:
    return "perplexity" if text else "right, %"


def score(row: Row, text: bool) -> str:
    """Accuracy in %, with its standard error; perplexity without, since its spread is that between texts."""
    return f"{row.score.value:.3f}" if text else percent(row.score)


def percent(value: Estimate | None) -> str:
    """In % and with its standard error; a dash for None."""
    return "-" if value is None else f"{100 * value.value:.1f}±{100 * value.error:.1f}"


def _table(title: str, *columns: str, words: int = 0) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < words else "right", no_wrap=True)
    return table
