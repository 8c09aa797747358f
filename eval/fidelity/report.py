"""A study as JSON, and on a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from scout_hf.eval.fidelity.tables import NOTE, tables
from scout_hf.files import write_text


def save(record: dict[str, Any], path: Path) -> None:
    """Write a record as JSON, one cell per line; numbers have five digits."""
    head = {name: value for name, value in record.items() if name != "cells"}
    lines = ",\n".join("  " + json.dumps(_rounded(cell), separators=(",", ":")) for cell in record["cells"])
    text = json.dumps(head, indent=1)[:-2] + f',\n "cells": [\n{lines}\n ]\n}}\n'
    write_text(path, text)


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
    console.print(NOTE, style="dim", highlight=False)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value
