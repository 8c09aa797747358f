"""The file of a comparison: every cell as it is done, and what of it a later run need not measure again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from scout_hf.eval.bench import machine
from scout_hf.eval.methods.grid import Cell
from scout_hf.files import read_json, write_text
from scout_hf.rules import count, fields, flag, items, maybe, number, one_of, simple, table, text

VERSIONS = ("torch", "transformers", "scout_hf", "cpu")
AGAIN = ("missing", "failed")
"""Outcomes that another try may change: what was not installed may be there by now."""

_ABOVE_ZERO, _FROM_ZERO, _WORD = number(1e-9, 1e15), number(0, 1e18), text(400)
_WHY = {name: text() for name in ("missing", "failed", "oom")}
_NEEDED = {
    "speed": {"shape": _WORD, "context": count(1), "batch": count(1)},
    "equal": {"context": count(1)},
    "score": {"task": _WORD, "context": count(1), "budget": count()},
}
_FIGURES = {
    "speed": {name: _ABOVE_ZERO for name in ("step_ms", "q1_ms", "q3_ms", "tokens_per_s")}
    | {"device_bytes": _FROM_ZERO, "host_bytes": _FROM_ZERO, "exact": flag},
    "equal": {"batch": count(), "tokens_per_s": _ABOVE_ZERO, "step_ms": _ABOVE_ZERO},
    "score": {"right": count(), "questions": count(1), "exact": flag}
    | {"row_step_ms": _ABOVE_ZERO, "prefill_s": _FROM_ZERO},
}
_OTHERS = {"gib": maybe(_ABOVE_ZERO), "link_bytes": _FROM_ZERO, "join_ms": _FROM_ZERO, "cpu_ms": _FROM_ZERO}
_OTHERS |= {"shares": table(number(-1e3, 1e3)), "cpu_ratio": maybe(number(0, 1e6)), "commit": maybe(_WORD)}
_OTHERS |= {"shape": _WORD, "batch": count(), "model": _WORD} | _WHY


def _cell(value: Any) -> None:
    fields({"part": one_of(*_NEEDED), "way": _WORD}, _OTHERS)(value)
    part = value["part"]
    fields(_NEEDED[part])(value)
    if "step_ms" in value or "row_step_ms" in value:
        fields(_FIGURES[part])(value)
    elif not any(name in value for name in _WHY):
        raise ValueError(f": there is neither a figure nor a reason for none ({', '.join(_WHY)})")


_RATES = fields({"link_gbps": maybe(_ABOVE_ZERO), "cpu_gbps": maybe(_ABOVE_ZERO)}, closed=True)
_SIZES = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
RULE = fields(
    {
        "benchmark": one_of("methods"),
        "settings": fields(
            {name: count() for name in ("budget", "layers", "threads")}
            | {"drift": _FROM_ZERO, "emulation": _RATES, "emulated_as": text()},
            {"shape": _WORD, "block_size": count(1)},
        ),
        "machine": table(simple),
        "cells": items(_cell),
    },
    {"commands": items(text()), "models": table(fields({name: count(1) for name in _SIZES}))},
)
"""What a comparison must hold for its tables and plots, and to be gone on with."""


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
    theirs = {**before["settings"], **{name: before["machine"].get(name) for name in VERSIONS}}
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
    """A record that was written; ConfigError for anything else."""
    remedy = "if it is no record of scout-hf bench methods, give another --out, or --fresh to write over it"
    return read_json(path, RULE, remedy)


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
