"""The bodies of ``scout-hf plan``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from scout_hf import ScoutConfig
from scout_hf.errors import ConfigError
from scout_hf.eval.bench.machine import describe
from scout_hf.eval.plan import check as checks
from scout_hf.eval.plan import measure as measures
from scout_hf.eval.plan.show import check_tables, plan_tables
from scout_hf.eval.reading import read_json
from scout_hf.planner import MACHINES, SHAPES, Load, Machine, ModelShape

FLAGS = {
    "link_gbps": "--link",
    "cpu_gbps": "--dram",
    "device_gib": "--device-gib",
    "host_gib": "--host-gib",
    "layer_us": "--layer-us",
}
NEEDED = "make one with `scout-hf plan --measure` on the machine, and pass it as --machine"


def measure(out: Path, tell: Callable[[str], Any]) -> None:
    """Write this machine's constants."""
    found, facts = measures.measure(tell)
    found.save(out, facts=facts, machine_was=describe())
    for name, value in facts.items():
        tell(f"{name:<18} {value:.4g}")
    tell(f"wrote {out}")


def check(record: Path, machine: Path | None) -> None:
    """Print predictions beside what was measured."""
    measured = read_json(record)
    if machine is None:
        raise ConfigError(f"--check takes the constants of the machine that was measured: {NEEDED}")
    found, facts = Machine.load(machine), read_json(machine).get("facts")
    if not facts:
        raise ConfigError(f"{machine} has no measured facts: {NEEDED}")
    _print(check_tables(checks.check(measured, found, facts)))


def show(model: str, gpu: str, machine: Path | None, given: dict[str, float | None], load: tuple) -> None:
    """Print what every method would take."""
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{FLAGS[name]} {value:g} is not allowed: a number above 0")
    if machine is not None:
        where = Machine.load(machine)
    elif gpu in MACHINES:
        where = MACHINES[gpu]
    else:
        raise ConfigError(f"--gpu {gpu} is not known; there are {', '.join(MACHINES)}. For another machine {NEEDED}")
    where = replace(where, **{name: value for name, value in given.items() if value is not None})
    load = Load(*load)
    ScoutConfig(budget=load.budget, block_size=load.block_size)
    _print(plan_tables(_shape(model), where, load))


def _shape(model: str) -> ModelShape:
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"--model {model} is neither known nor a config.json; known are {', '.join(SHAPES)}")
    return ModelShape.of(read_json(path), path.parent.name)


def _print(parts) -> None:
    console = Console()
    for part in parts:
        console.print(part, highlight=False)
