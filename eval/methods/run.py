"""The whole comparison: a grid of cells, each written as it is done, so that a run that was ended goes on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel

from scout_hf import ScoutConfig
from scout_hf.eval.bench import device as devices
from scout_hf.eval.fidelity.subjects import available
from scout_hf.eval.methods import grid, record, score, speed, ways
from scout_hf.eval.methods.emulate import emulation_of
from scout_hf.eval.pocket import TASKS

QUICK = {"contexts": (8192,), "batches": (1,), "layers": 2, "mha_contexts": (2048,), "equal_context": 8192}
QUICK |= {"tasks": ("needle",), "budget_shares": (0.125,), "questions": 16, "seconds": 1.0}
MOST_STEPS = 60
SHAPE, DEVICE = "gqa", "cpu"
FACTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")


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
    shape: str = SHAPE,
    device: str = DEVICE,
    memory_gib: Sequence[float] = (),
    kvpress_python: str | None = None,
    path: Path | None = None,
    fresh: bool = False,
    command: str | None = None,
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
    shape : str
        Of the model with random weights: one of ``speed.SHAPES``, ``llama-3-8b``, ``qwen3-14b``, or the folder of a
        model, which is taken whole.
    device : str
        Of the model with random weights, or the given one; on ``cpu`` both tiers are in host memory.
    memory_gib : sequence of float
        For each, as many rows of every way as fit into so much memory of the device, beside the weights.
    kvpress_python : str or None
        An interpreter that has kvpress; None for this one.
    path : Path or None
        JSON to go on with, and to write after every cell; ``fresh`` forgets what it has.
    command : str or None
        What was typed, for the record.
    """
    chosen = tuple(chosen or ways.names())
    for name in chosen:
        ways.find(name)
    _check(shape, device, model, tasks, contexts, batches, memory_gib)
    ScoutConfig(budget=budget, block_size=block_size, link_gbps=link_gbps, cpu_gbps=cpu_gbps)
    least = speed.TURN_TOKENS + 4 * block_size
    if short := [context for context in contexts if context < least]:
        raise ValueError(f"--contexts {short[0]}: a turn and four blocks are the least, {least}; try 8192")
    emulation, why = emulation_of(emulate, link_gbps, cpu_gbps, block_size)
    settings = {"budget": budget, "block_size": block_size, "layers": layers, "drift": drift, "seed": seed}
    settings |= {"questions": questions, "emulation": vars(emulation), "emulated_as": why}
    # Files that were begun before these could be chosen say nothing of them.
    settings |= {"shape": shape} if shape != SHAPE else {}
    settings |= {"device": device} if device != DEVICE else {}
    known = record.begin(path, fresh, settings)
    emulation = speed.Emulation(**known["settings"]["emulation"])
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

    def measure(cell: grid.Cell) -> dict[str, Any]:
        if cell["part"] == grid.SCORE:
            size = (cell["context"], cell["budget"], block_size // 2)
            where = (cell["model"], cell["way"], cell["task"], *size, questions)
            return score.measure(*where, speed.Emulation(), kvpress_python)
        if not cell["batch"]:
            memory = f"{cell['gib']:g} GiB" if "gib" in cell else "a row of stock"
            return {"oom": f"one row holds more than {memory} on the device"}
        size = (cell["context"], cell["batch"], budget, block_size)
        model = random_model(cell["shape"])
        return speed.measure(model, cell["way"], *size, emulation, drift, seconds, MOST_STEPS)

    wanted = list(
        grid.cells(
            chosen, shape, contexts, batches, mha_contexts, equal_context, memory_gib, model, tasks, score_context,
            budget_shares,
        )
    )  # fmt: skip
    if others := sum(record.foreign(known, cell) for cell in wanted if record.has(known, cell)):
        tell(f"{others} cells were measured with other code; --fresh measures everything again")
    for cell in tqdm(wanted, disable=None, unit="cell"):
        if cell["part"] == grid.EQUAL:
            cell["batch"] = grid.rows_that_fit(known, cell)
        if cell.get("batch", 1) is None or record.has(known, cell):
            continue
        tell(" ".join(str(value) for value in cell.values()))
        found = devices.outcome(functools.partial(measure, cell), place)
        devices.release(place)
        if "failed" in found:
            tell(f"failed: {found['failed']}")
        record.add(known, cell, found, path)
    record.write(known, path)
    return known


def _check(shape, device, model, tasks, contexts, batches, memory_gib) -> None:
    speed.check_shape(shape)
    devices.find(device)
    if model not in (models := available()):
        raise ValueError(f"no trained model {model!r} here; there are: {', '.join(models)}")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"no task {unknown[0]!r}; there are: {', '.join(TASKS)}")
    if wrong := [value for value in (*batches, *memory_gib) if value <= 0]:
        raise ValueError(f"{wrong[0]} is neither rows nor GiB: give numbers above 0")
