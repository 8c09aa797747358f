"""A study as tables for a terminal and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from scout_hf.eval.bench.machine import describe
from scout_hf.eval.fidelity.cells import FULL, MODES, budget_name
from scout_hf.eval.fidelity.measure import Effort
from scout_hf.eval.fidelity.summary import Estimate, Row, rows

NAMES = {
    FULL: "full attention",
    "real": "real",
    "real-int8": "real, int8 KV",
    "real-two-tiers": "real, 2 tiers",
    "predicted": "predicted",
    "predicted-real-cpu": "pred., CPU real",
    "predicted-no-recall": "pred., no recall",
}
"""Which query chose and attended."""

NOTE = """\
lost to selection: full attention less the real query on as many tiers; to prediction: that less the predicted query; \
in points (text: % of perplexity), over the same questions, with standard errors. Two tiers also attend residents that \
were not chosen. tok/s: decode steps of {rows} in one thread."""


def record_of(results: list[dict[str, Any]], effort: Effort, weights: dict[str, str], preset: str) -> dict[str, Any]:
    """All of a study, ready for JSON."""
    settings = {name: getattr(effort, name) for name in ("questions", "windows", "steps", "seed")}
    return {
        "study": "fidelity",
        "settings": {"preset": preset, **settings, "modes": MODES},
        "machine": describe(),
        "weights": weights,
        "cells": results,
    }


def save(record: dict[str, Any], path: Path) -> None:
    """Write a record as JSON, one cell per line; numbers have five digits."""
    head = {name: value for name, value in record.items() if name != "cells"}
    lines = ",\n".join("  " + json.dumps(_rounded(cell), separators=(",", ":")) for cell in record["cells"])
    text = json.dumps(head, indent=1)[:-2] + f',\n "cells": [\n{lines}\n ]\n}}\n'
    path.write_text(text)


def load(path: Path) -> dict[str, Any]:
    """A record that was saved; ValueError for anything else."""
    try:
        record = json.loads(path.read_text())
        if record["study"] != "fidelity":
            raise KeyError("study")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no study of fidelity; give a fidelity.json of scout-hf fidelity") from error
    return record


def show(record: dict[str, Any], console: Console | None = None) -> None:
    """Print a record."""
    console = console or Console()
    for part in tables(record):
        console.print(part, highlight=False)
    console.print(NOTE.format(rows="up to 32 rows together"), style="dim", highlight=False)


def tables(record: dict[str, Any]) -> Iterator[Table]:
    """A table per kind of documents: their length and their stress, questions first, then text."""
    for text in (False, True):
        found = rows(record["cells"], text)
        for tokens, stress in dict.fromkeys((row.setting["tokens"], row.setting["stress"]) for row in found):
            part = [row for row in found if (row.setting["tokens"], row.setting["stress"]) == (tokens, stress)]
            yield _table(part, text, tokens, stress)


def _table(found: Sequence[Row], text: bool, tokens: int, stress: str) -> Table:
    what = f"perplexity after {tokens} tokens" if text else f"accuracy in % on {tokens} tokens"
    models, tasks = (", ".join(dict.fromkeys(one[name] for one in found[0].records)) for name in ("model", "task"))
    counted = f"{found[0].count} windows" if text else f"{found[0].count} questions ({models}: {tasks})"
    title = f"{what}, {counted}" + ("" if stress == "none" else f", stress {stress}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("budget", "block", "blocks by", "query"):
        table.add_column(name, no_wrap=True)
    for name in ("perplexity" if text else "right", "lost to\nselection", "lost to\nprediction", "read", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    ordered, before = in_order(found), None
    for index, row in enumerate(ordered):
        head = (budget_name(row.setting["budget"]), str(row.setting["block_size"] or "-"), row.setting["digest"] or "-")
        after = ordered[index + 1].setting if index + 1 < len(ordered) else None
        table.add_row(
            *(head if head != before else ("", "", "")),
            NAMES[row.setting["mode"]],
            f"{row.score.value:.3f}" if text else _percent(row.score),
            _percent(row.lost_to_selection),
            _percent(row.lost_to_prediction),
            f"{row.attended_share:.1%}",
            f"{row.tokens_per_second:.0f}",
            end_section=after is not None and after["budget"] != row.setting["budget"],
        )
        before = head
    return table


def in_order(found: Sequence[Row]) -> list[Row]:
    """Full attention first; then by budget, shares before tokens, by block size, digest (the oracle first) and mode."""
    digests = sorted({row.setting["digest"] or "" for row in found}, key=_digest_order)

    def place(row: Row) -> tuple:
        setting = row.setting
        budget = setting["budget"] or 0
        sizes = (isinstance(budget, int), budget, setting["block_size"] or 0)
        return (
            setting["mode"] != FULL,
            *sizes,
            digests.index(setting["digest"] or ""),
            list(MODES).index(setting["mode"]),
        )

    return sorted(found, key=place)


def _digest_order(name: str) -> tuple[int, str]:
    return {"oracle": 0, "minmax": 1, "random": 3, "recent": 3}.get(name, 2), name


def _percent(value: Estimate | None) -> str:
    return "-" if value is None else f"{100 * value.value:.1f}±{100 * value.error:.1f}"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value
