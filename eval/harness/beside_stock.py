"""The same tasks with stock attention and then with Scout, in one table: scores, speed, bytes and what was attended."""

from __future__ import annotations

import argparse
import copy
import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from scout_hf.eval.harness import HarnessError
from scout_hf.eval.harness.command import option
from scout_hf.eval.tables import Grid, tiers
from scout_hf.files import write_text

REPORT = "beside_stock.json"
SIDES = ("stock", "scout")


@dataclass
class Row:
    """One metric of one task or group: its scores, and by side what it cost (``Tally.as_dict()``; None for a group)."""

    task: str
    metric: str
    stock: float
    scout: float
    cost: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    @property
    def difference(self) -> float:
        """The score of scout minus that of stock."""
        return self.scout - self.stock


def run_both(args: argparse.Namespace, execute: Callable[[argparse.Namespace], None]) -> None:
    """Run lm-eval with stock attention and with scout, print a table, and save it under ``--output_path``.

    ``execute`` runs lm-eval with such arguments. HarnessError if ``--model`` is not ``scout``, or ``attention`` is
    among the model arguments.
    """
    if (model := option(args, "model")) != "scout":
        raise HarnessError(f"--beside-stock compares `--model scout` with stock attention; --model is {model!r}")
    model_args = option(args, "model_args") or {}
    if isinstance(model_args, str):
        from lm_eval.utils import simple_parse_args_string

        model_args = simple_parse_args_string(model_args)
    if "attention" in model_args:
        raise HarnessError("--beside-stock sets attention=stock and attention=scout itself; leave it out of model_args")
    place = _folder(option(args, "output_path"))
    results = {}
    for side in SIDES:
        one = copy.copy(args)
        one.model_args = {**model_args, "attention": side}
        if place:
            one.output_path = str(place / side)
        if cache := option(args, "use_cache"):
            # The cache knows prompts only: Scout would be given the answers of stock.
            one.use_cache = f"{cache}_{side}"
        with _kept_results() as kept:
            execute(one)
        gc.collect()
        # Only one of several processes has results.
        results[side] = kept[-1] if kept else None
    if not all(results.values()):
        return
    rows = compare(results["stock"], results["scout"])
    show(rows)
    if place:
        place.mkdir(parents=True, exist_ok=True)
        path = place / REPORT
        write_text(path, json.dumps(as_record(rows, results), indent=1, default=str) + "\n")
        print(f"wrote {path}")


def compare(stock: dict[str, Any], scout: dict[str, Any]) -> list[Row]:
    """The rows of two results of ``lm_eval.simple_evaluate``.

    LongBench tasks have only ``score``, since their other metric has the same value.
    """
    costs = {side: result["config"]["scout_hf"]["tasks"] for side, result in zip(SIDES, (stock, scout))}
    before = stock.get("groups", {}) | stock["results"]
    rows = []
    for task, metrics in {**scout["results"], **scout.get("groups", {})}.items():
        names = [name for name, value in metrics.items() if _is_score(name, value)]
        for name in [name for name in names if name.startswith("score,")] or names:
            # RULER's mark of a length that was not asked for.
            if not before[task][name] == metrics[name] == -1:
                cost = {side: costs[side].get(task) for side in SIDES}
                scores = float(before[task][name]), float(metrics[name])
                rows.append(Row(task, name.removesuffix(",none"), *scores, cost))
    return rows


def show(rows: list[Row], console: Console | None = None) -> None:
    """Print the table, 140 columns wide if standard output is no terminal."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 140
    figures = ("stock", "scout", "differ.", "tok/s stock", "tok/s scout", "KV stock", "KV scout", "attended")
    table = Grid("stock attention and scout", ("task", "metric", *figures), 2)
    for row in rows:
        stock, scout = (row.cost.get(side) or {} for side in SIDES)
        scores = f"{row.stock:.4f}", f"{row.scout:.4f}", f"{row.difference:+.4f}"
        speeds = (_number(cost.get("tokens_per_second"), ".1f") for cost in (stock, scout))
        held = (f"{tiers(cost['kv_bytes'])} MiB" if cost.get("kv_bytes") else "-" for cost in (stock, scout))
        table.add(row.task, row.metric, *scores, *speeds, *held, _number(scout.get("attended_share"), ".1%"))
    console.print(table, highlight=False)


def as_record(rows: list[Row], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The table for JSON, with settings and versions."""
    config = results["scout"]["config"]
    return {
        "rows": [{**asdict(row), "difference": row.difference} for row in rows],
        "scout_hf": {name: value for name, value in config["scout_hf"].items() if name != "tasks"},
        **{name: config[name] for name in ("model_args", "batch_size", "limit")},
        "seeds": {name: config.get(f"{name}_seed") for name in ("random", "numpy", "torch", "fewshot")},
        "versions": {name: results["scout"].get(name) for name in ("lm_eval_version", "transformers_version")},
    }


@contextmanager
def _kept_results() -> Iterator[list[dict[str, Any]]]:
    """What lm-eval's command line computes and only prints."""
    import lm_eval.evaluator

    kept, original = [], lm_eval.evaluator.simple_evaluate

    def evaluate(*args: Any, **options: Any) -> dict[str, Any] | None:
        results = original(*args, **options)
        if results is not None:
            kept.append(results)
        return results

    lm_eval.evaluator.simple_evaluate = evaluate
    try:
        yield kept
    finally:
        lm_eval.evaluator.simple_evaluate = original


def _folder(output_path: str | None) -> Path | None:
    """``--output_path`` may name a JSON file too; its folder then."""
    if not output_path:
        return None
    path = Path(output_path)
    return path.parent if path.suffix == ".json" else path


def _is_score(name: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and "," in name and "_stderr," not in name


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
