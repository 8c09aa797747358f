"""The whole comparison: a grid of cells, each written as it is done, so that a run that was ended goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from scout_hf.eval.bench import machine
from scout_hf.eval.fidelity.subjects import available
from scout_hf.eval.methods import score, speed, ways
from scout_hf.eval.methods.emulate import emulation_of

QUICK = {"contexts": (8192,), "batches": (1,), "layers": 2, "mha_contexts": (2048,), "equal_context": 8192}
QUICK |= {"tasks": ("needle",), "budget_shares": (0.125,), "questions": 16, "seconds": 1.0}
SPEED_WAYS = tuple(name for name in ways.names() if name != "scout, one tier")
EXACT_WAYS = ("kvpr", "dense", "stock")
MOST_ROWS = 16
VERSIONS = ("torch", "transformers", "scout_hf", "cpu")


def run(
    contexts: Sequence[int] = (8192, 16384, 32768),
    batches: Sequence[int] = (4,),
    chosen: Sequence[str] | None = None,
    budget: int = 2048,
    block_size: int = 32,
    layers: int = 4,
    mha_contexts: Sequence[int] = (8192,),
    equal_context: int | None = 16384,
    tasks: Sequence[str] = ("needle", "values"),
    model: str = "llama",
    score_context: int = 4096,
    budget_shares: Sequence[float] = (0.0625, 0.125, 0.25),
    questions: int = 32,
    link_gbps: float | None = None,
    cpu_gbps: float | None = None,
    emulate: str | None = None,
    drift: float = 0.1,
    seconds: float = 10.0,
    seed: int = 0,
    path: Path | None = None,
    fresh: bool = False,
    tell: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """Measure what ``path`` does not have yet; returns the record, in a form that JSON takes.

    Parameters
    ----------
    contexts, batches : sequence of int
        Of the model with random weights (32 query and 8 KV heads of 64), ``layers`` deep.
    chosen : sequence of str or None
        Ways, see :func:`scout_hf.eval.methods.ways.names`; None for all.
    budget, block_size : int
    mha_contexts : sequence of int
        Contexts for a model without GQA, batch 1, exact ways alone: where KVPR can pay.
    equal_context : int or None
        Context at which every way gets as many rows as fit into the device memory of one stock row.
    tasks, model, score_context, questions
        What the trained pocket model is asked.
    budget_shares : sequence of float
        Of that context.
    link_gbps, cpu_gbps : float or None
        Emulated rates for the model with random weights, see :class:`scout_hf.ScoutConfig`.
    emulate : "paper" or None
        Set both from the rate at which this machine attends on one thread, in the proportions of the paper.
    drift : float
        Share of the chosen blocks that changes per step where weights are random.
    seconds : float
        Of timed steps per cell, at least three.
    path : Path or None
        JSON to go on with, and to write after every cell; ``fresh`` forgets what it has.
    """
    chosen = tuple(chosen or ways.names())
    for name in chosen:
        ways.find(name)
    if model not in (models := available()):
        raise ValueError(f"no trained model {model!r} here; there are: {', '.join(models)}")
    emulation, why = emulation_of(emulate, link_gbps, cpu_gbps, block_size)
    common = {"budget": budget, "block_size": block_size, "layers": layers, "drift": drift, "seed": seed}
    cells = [
        *_speed_cells("gqa", contexts, batches, [name for name in chosen if name in SPEED_WAYS]),
        *_speed_cells("mha", mha_contexts, (1,), [name for name in chosen if name in EXACT_WAYS]),
        *_equal_cells(equal_context, [name for name in chosen if name in SPEED_WAYS]),
        *_score_cells(chosen, model, tasks, score_context, budget_shares),
    ]
    made: dict[str, LlamaForCausalLM] = {}

    def random_model(shape: str) -> LlamaForCausalLM:
        if shape not in made:
            made.clear()  # one at a time
            made[shape] = speed.make_model(shape, layers, seed)
        return made[shape]

    record = _begin(path, fresh, common | {"questions": questions, "emulation": vars(emulation), "emulated_as": why})
    emulation = speed.Emulation(**record["settings"]["emulation"])
    progress = tqdm(cells, disable=None, unit="cell")
    for cell in progress:
        if cell["part"] == "equal":
            cell["batch"] = _rows_that_fit(record, cell)
        if cell.get("batch") == 0 or _has(record, cell):
            continue
        tell(" ".join(str(value) for value in cell.values()))
        if cell["part"] in ("speed", "equal"):
            size = (cell["context"], cell["batch"], budget, block_size)
            found = speed.measure(random_model(cell["shape"]), cell["way"], *size, emulation, drift, seconds, 60)
        else:
            size = (cell["context"], cell["budget"], block_size // 2)
            where = (cell["model"], cell["way"], cell["task"], *size, questions)
            found = score.measure(*where, speed.Emulation())
        record["cells"].append(cell | found | {"run": time.strftime("%Y-%m-%d %H:%M:%S")})
        _write(record, path)
    _write(record, path)
    return record


def _speed_cells(shape: str, contexts: Sequence[int], batches: Sequence[int], chosen: Sequence[str]) -> Iterator[dict]:
    for context in contexts:
        for batch in batches:
            for way in chosen:
                yield {"part": "speed", "way": way, "shape": shape, "context": context, "batch": batch}


def _equal_cells(context: int | None, chosen: Sequence[str]) -> Iterator[dict]:
    for way in chosen if context else ():
        yield {"part": "equal", "way": way, "shape": "gqa", "context": context}


def _rows_that_fit(record: dict[str, Any], cell: dict[str, Any]) -> int:
    """Rows of a way in the device memory of one stock row, by what it held before; 0 where that is not known."""
    same = [one for one in record["cells"] if one["part"] == "speed" and "step_ms" in one]
    same = [one for one in same if (one["shape"], one["context"]) == (cell["shape"], cell["context"])]
    per_row = {one["way"]: one["device_bytes"] / one["batch"] for one in same}
    if "stock" not in per_row or cell["way"] not in per_row:
        return 0
    return max(1, min(MOST_ROWS, int(1.01 * per_row["stock"] / per_row[cell["way"]])))


def _has(record: dict[str, Any], cell: dict[str, Any]) -> bool:
    return any(all(one.get(name) == value for name, value in cell.items()) for one in record["cells"])


def _score_cells(chosen, model: str, tasks: Sequence[str], context: int, shares: Sequence[float]) -> Iterator[dict]:
    for task in tasks:
        for way in chosen:
            budgets = [int(share * context) for share in shares] if ways.find(way).takes_budget else [context]
            for budget in budgets:
                where = {"part": "score", "way": way, "model": model, "task": task}
                yield where | {"context": context, "budget": budget}


def _begin(path: Path | None, fresh: bool, settings: dict[str, Any]) -> dict[str, Any]:
    facts = machine.describe()
    record = {"benchmark": "methods", "settings": settings | {"threads": torch.get_num_threads()}, "machine": facts}
    record["cells"] = []
    if path is None or fresh or not path.exists():
        return record
    before = json.loads(path.read_text())
    theirs = {**before["settings"], **{name: before["machine"][name] for name in VERSIONS}}
    ours = {**record["settings"], **{name: facts[name] for name in VERSIONS}}
    # Emulated rates that were measured keep the value of the first run.
    if theirs["emulated_as"] == ours["emulated_as"]:
        ours["emulation"] = theirs["emulation"]
    if differ := [f"{name}={theirs.get(name)!r}" for name in ours if theirs.get(name) != ours[name]]:
        raise ValueError(
            f"{path} holds figures with {', '.join(differ)}, which cannot stand beside what is asked for; give the "
            "same settings to go on, --fresh to begin anew, or another --out"
        )
    return record | {"settings": before["settings"], "cells": before["cells"]}


def _write(record: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        os.replace(scratch, path)
