"""The whole comparison: a grid of cells, each saved when it is done; interrupted runs resume.

Later cells use results of earlier ones, so their order matters.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from scout_hf import ScoutConfig
from scout_hf.eval import arms, rules
from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench import machine
from scout_hf.eval.bench.options import Tell, silent
from scout_hf.eval.methods import score, speed
from scout_hf.eval.methods.options import Methods
from scout_hf.eval.methods.speed import Emulation, emulation_of
from scout_hf.eval.pocket import TASKS
from scout_hf.eval.records import Record

MOST_ROWS = 16
SPEED, EQUAL, SCORE = "speed", "equal", "score"
SCORE_ONLY = (arms.KVPRESS, "scout, one tier")
SPEED_ONLY = (arms.FOLDED, *arms.SAME_ANSWERS)
EXACT_WAYS = ("kvpr", "dense", "stock")
FACTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
VERSIONS = ("torch", "transformers", "scout_hf", "cpu")
GIB = 2**30

Cell = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """What is measured; options say otherwise where they are given.

    ``mha_contexts``: for a model without GQA, batch 1, exact ways alone: where KVPR can pay. ``equal_context``: every
    way gets as many rows as fit into the device memory of one stock row of that context. ``score_context``: what the
    trained model is asked about, with budgets that are ``budget_shares`` of it. ``seconds``: of timed steps per cell,
    at least three steps.
    """

    contexts: Sequence[int] = (8192, 16384, 32768)
    batches: Sequence[int] = (4,)
    layers: int = 4
    mha_contexts: Sequence[int] = (8192,)
    equal_context: int | None = 16384
    tasks: Sequence[str] = ("needle", "values")
    questions: int = 32
    score_context: int = 4096
    budget_shares: Sequence[float] = (0.0625, 0.125, 0.25)
    seconds: float = 10.0


QUICK = Grid((8192,), (1,), 2, (2048,), 8192, ("needle",), 16, budget_shares=(0.125,), seconds=1.0)


def run(options: Methods, grid: Grid | None = None, command: str | None = None, tell: Tell = silent) -> dict[str, Any]:
    """Measure what the file in ``out`` does not have yet; returns the record, in a form that JSON takes."""
    given = {"contexts": options.contexts, "batches": options.batches, "layers": options.layers, "tasks": options.task}
    given |= {"questions": options.questions, "equal_context": max(options.contexts or [0])}
    grid = replace(grid or (QUICK if options.quick else Grid()), **{name: one for name, one in given.items() if one})
    contexts, layers, questions, seed = grid.contexts, grid.layers, grid.questions, options.seed
    budget, block_size, shape, device = options.budget, options.block_size, options.shape, options.device
    chosen, model = arms.parse(options.way) or arms.names(), options.model
    _check(options, grid)
    rates = {"link_gbps": options.link_gbps, "cpu_gbps": options.cpu_gbps}
    ScoutConfig(budget=budget, block_size=block_size, **rates)
    least = speed.TURN_TOKENS + 4 * block_size
    if short := [context for context in contexts if context < least]:
        raise ValueError(f"--contexts {short[0]}: a turn and four blocks are the least, {least}; try 8192")
    emulation, why = emulation_of(options.emulate, **rates, block_size=block_size)
    settings = {"budget": budget, "block_size": block_size, "layers": layers, "drift": options.drift, "seed": seed}
    settings |= {"questions": questions, "emulation": vars(emulation), "emulated_as": why}
    # Older files do not have these settings.
    settings |= {"shape": shape} if shape != Methods.shape else {}
    settings |= {"device": device} if device != Methods.device else {}
    file = begin(options.out and options.out / "methods.json", options.fresh, settings)
    known = file.held
    emulation = Emulation(**known["settings"]["emulation"])
    if command and command not in known["commands"]:
        known["commands"].append(command)
    place, made = devices.find(device), {}

    def random_model(name: str) -> PreTrainedModel:
        if name not in made:
            made.clear()  # one at a time
            made[name] = speed.make_model(name, layers, seed, device)
            config = made[name].config
            facts = {field: getattr(config, field) for field in FACTS}
            known.setdefault("models", {})[name] = facts | {"dtype": str(made[name].dtype).removeprefix("torch.")}
        return made[name]

    def measure(cell: Cell) -> dict[str, Any]:
        if cell["part"] == SCORE:
            return score.measure(cell, options, questions)
        if not cell["batch"]:
            memory = f"{cell['gib']:g} GiB" if "gib" in cell else "a row of stock"
            return {"oom": f"one row holds more than {memory} on the device"}
        return speed.measure(cell, options, random_model(cell["shape"]), emulation, grid.seconds)

    timed = [name for name in chosen if name not in SCORE_ONLY]
    wanted = [*_speed(shape, contexts, grid.batches, timed)]
    wanted += _speed("mha", grid.mha_contexts, (1,), [name for name in timed if name in EXACT_WAYS])
    rows = [{"context": grid.equal_context}] if grid.equal_context else []
    rows += [{"context": context, "gib": gib} for context in contexts for gib in options.memory_gib or ()]
    wanted += [{"part": EQUAL, "way": way, "shape": shape} | size for size in rows for way in timed]
    shares = [int(share * grid.score_context) for share in grid.budget_shares]
    for task in grid.tasks:
        for way in (name for name in chosen if name not in SPEED_ONLY):
            where = {"part": SCORE, "way": way, "model": model, "task": task, "context": grid.score_context}
            budgets = shares if arms.find(way).takes_budget else [grid.score_context]
            wanted += [where | {"budget": tokens} for tokens in budgets]
    if others := sum(file.foreign(cell) for cell in wanted if file.has(cell)):
        tell(f"{others} cells were measured with other code; --fresh measures everything again")
    for cell in tqdm(wanted, disable=None, unit="cell"):
        if cell["part"] == EQUAL:
            cell["batch"] = rows_that_fit(known, cell)
        if cell.get("batch", 1) is None or file.has(cell):
            continue
        tell(" ".join(str(value) for value in cell.values()))
        found = devices.outcome(functools.partial(measure, cell), place)
        devices.release(place)
        if "failed" in found:
            tell(f"failed: {found['failed']}")
        file.add(cell, found)
    file.write()
    return known


def begin(path: Path | None, fresh: bool, settings: dict[str, Any]) -> Record:
    """What was found so far with these settings and versions, on this machine; see :class:`Record` for errors."""
    facts = machine.describe()
    held = {"benchmark": "methods", "settings": settings | {"threads": torch.get_num_threads()}, "machine": facts}

    def same(record: dict[str, Any]) -> dict[str, Any]:
        given = dict(record["settings"])
        # Rates that were measured differ from run to run; those of the first run are kept.
        if given["emulated_as"] != "as given":
            del given["emulation"]
        return given | {name: record["machine"].get(name) for name in VERSIONS}

    held |= {"commands": [], "cells": []}
    return Record(path, fresh, held, rules.METHODS, same, ("settings", "cells", "commands"))


def rows_that_fit(record: dict[str, Any], cell: Cell) -> int | None:
    """Rows of an ``equal`` cell: as many as fit into ``gib``, or into the device memory of one stock row.

    By what a row of a ``speed`` cell held, beside the weights, 0 where one is too much; None where there is none.
    """
    same = [one for one in record["cells"] if one["part"] == SPEED and "step_ms" in one]
    same = [one for one in same if (one["shape"], one["context"]) == (cell["shape"], cell["context"])]
    per_row = {one["way"]: one["device_bytes"] / one["batch"] for one in same}
    if cell["way"] not in per_row or ("gib" not in cell and "stock" not in per_row):
        return None
    # A cache holds a few tokens more where more steps were timed.
    memory = cell["gib"] * GIB if "gib" in cell else 1.01 * per_row["stock"]
    return min(MOST_ROWS, int(memory / max(1.0, per_row[cell["way"]])))


def _speed(shape: str, contexts: Sequence[int], batches: Sequence[int], chosen: Sequence[str]) -> Iterator[Cell]:
    for context in contexts:
        for batch in batches:
            for way in chosen:
                yield {"part": SPEED, "way": way, "shape": shape, "context": context, "batch": batch}


def _check(options: Methods, grid: Grid) -> None:
    speed.check_shape(options.shape)
    devices.find(options.device)
    score.subject(options.model)  # ValueError for a name there is not, FileNotFoundError without its weights
    if unknown := [task for task in grid.tasks if task not in TASKS]:
        raise ValueError(f"no task {unknown[0]!r}; there are: {', '.join(TASKS)}")
    if wrong := [value for value in (*grid.batches, *(options.memory_gib or ())) if value <= 0]:
        raise ValueError(f"{wrong[0]} is neither rows nor GiB: give numbers above 0")
