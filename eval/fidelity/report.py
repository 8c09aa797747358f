"""A study as JSON, and on a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from scout_hf.eval import tables
from scout_hf.eval.fidelity.cells import MODES, STRESSES, TEXT
from scout_hf.eval.fidelity.tables import NOTE
from scout_hf.eval.fidelity.tables import tables as fidelity_tables
from scout_hf.files import read_json, write_text
from scout_hf.rules import anything, count, fields, items, maybe, number, one_of, simple, table, text


def _answers(value: Any) -> None:
    text(1 << 20)(value)
    if not value or set(value) - set("01"):
        raise ValueError(f"0 or 1 for each question is wanted, not {value!r:.60}")


_BY_LAYER = ("mass", "output_error", "selection_error", "prediction_error", "block_recall", "cosine")
RESULT = fields(
    {},
    # Nats per token: what is beyond has no perplexity.
    {"right": _answers, "nll": items(number(0, 500), fewest=1), "cpu_ratio_by_step": table(items(number(0, 1e6)))}
    | {"attended_share": number(0, 1e6), "tokens_per_second": number(0)}
    | {name: items(maybe(number(-1e6, 1e6))) for name in _BY_LAYER},
)
"""What a result may hold."""

_CELL = fields(
    {
        "model": text(200),
        "task": text(200),
        "tokens": count(1),
        "mode": one_of(*MODES),
        "block_size": maybe(count(1)),
        "budget": maybe(number(0, 1e12)),
        "digest": maybe(text(200)),
        "stress": one_of(*STRESSES),
        "attended_share": anything,
        "tokens_per_second": anything,
    }
)


def _cell(value: Any) -> None:
    _CELL(value)
    RESULT(value)
    fields({"nll" if value["task"] == TEXT else "right": anything})(value)


RULE = fields(
    {
        "study": one_of("fidelity"),
        "settings": fields({}, {"modes": fields({})}),
        "machine": table(simple),
        "weights": table(text(200)),
        "cells": items(_cell),
    },
    {"failed": count()},
)
"""What a study must hold for its tables and plots."""


def save(record: dict[str, Any], path: Path) -> None:
    """Write a record as JSON, one cell per line; numbers have five digits."""
    head = {name: value for name, value in record.items() if name != "cells"}
    lines = ",\n".join("  " + json.dumps(_rounded(cell), separators=(",", ":")) for cell in record["cells"])
    text = json.dumps(head, indent=1)[:-2] + f',\n "cells": [\n{lines}\n ]\n}}\n'
    write_text(path, text)


def load(path: Path) -> dict[str, Any]:
    """A record that was saved; ConfigError for anything else."""
    return read_json(path, RULE, "give a fidelity.json of scout-hf fidelity")


def show(record: dict[str, Any], console: Console | None = None) -> None:
    """Print a record."""
    tables.show(fidelity_tables(record), NOTE, console)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value
