"""The file of a comparison: every cell as it is done, and what of it a later run need not measure again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from scout_hf.eval.bench import machine
from scout_hf.eval.methods.grid import Cell
from scout_hf.files import write_text

VERSIONS = ("torch", "transformers", "scout_hf", "cpu")
AGAIN = ("missing", "failed")
"""Outcomes that another try may change: what was not installed may be there by now."""


def begin(path: Path | None, fresh: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """What was found so far, in this file, or nothing yet.

    ValueError if it has figures of other settings, versions or another machine, or is of something else.
    """
    facts = machine.describe()
    record = {"benchmark": "methods", "settings": settings | {"threads": torch.get_num_threads()}, "machine": facts}
    record |= {"commands": [], "cells": []}
    if path is None or fresh or not path.exists():
        return record
    before = load(path)
    theirs = {**before["settings"], **{name: before["machine"][name] for name in VERSIONS}}
    ours = {**record["settings"], **{name: facts[name] for name in VERSIONS}}
    # Emulated rates that were measured keep the value of the first run.
    if theirs["emulated_as"] == ours["emulated_as"]:
        ours["emulation"] = theirs["emulation"]
    names = [*ours, *(name for name in theirs if name not in ours)]
    if differ := [f"{name}={theirs.get(name)!r}" for name in names if theirs.get(name) != ours.get(name)]:
        raise ValueError(
            f"{path} holds figures with {', '.join(differ)}, which cannot stand beside what is asked for; give the "
            "same settings to go on, --fresh to begin anew, or another --out"
        )
    kept = {name: before[name] for name in ("settings", "cells", "commands") if name in before}
    return record | kept


def load(path: Path) -> dict[str, Any]:
    """A record that was written; ValueError for anything else."""
    try:
        record = json.loads(path.read_text())
        if record["benchmark"] != "methods":
            raise KeyError("benchmark")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no record of scout-hf bench methods; give another --out, or --fresh to write over it"
        ) from error
    return record


def same(record: dict[str, Any], cell: Cell) -> list[dict[str, Any]]:
    """Results of this cell, whatever they are; cells with and without ``gib`` are two kinds."""
    named = {"gib": None} | cell
    return [one for one in record["cells"] if all(one.get(name) == value for name, value in named.items())]


def has(record: dict[str, Any], cell: Cell) -> bool:
    """Whether there is a result that another try would not change."""
    return any(not any(name in one for name in AGAIN) for one in same(record, cell))


def foreign(record: dict[str, Any], cell: Cell) -> bool:
    """Whether the result of this was measured at another commit, as far as that is known."""
    here = record["machine"]["commit"]
    return any(one.get("commit", here) != here for one in same(record, cell))


def add(record: dict[str, Any], cell: Cell, found: dict[str, Any], path: Path | None) -> None:
    """Put a result in the place of the one there is; it is in the file when this returns."""
    before = same(record, cell)
    record["cells"] = [one for one in record["cells"] if one not in before]
    when = {"run": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": record["machine"]["commit"]}
    record["cells"].append(cell | found | when)
    write(record, path)


def write(record: dict[str, Any], path: Path | None) -> None:
    """Everything; the old file stays whole until the new one is."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
