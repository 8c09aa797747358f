"""The bodies of ``scout-hf plan``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from scout_hf import ScoutConfig
from scout_hf.errors import ConfigError, MissingFileError
from scout_hf.eval import tables
from scout_hf.eval.plan.options import Plan
from scout_hf.eval.plan.show import check_tables, plan_tables
from scout_hf.eval.records import read_record
from scout_hf.files import read_json
from scout_hf.planner import MACHINES, SHAPES, Load, Machine, ModelShape
from scout_hf.rules import fields, items, text

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
    from scout_hf.eval.bench.machine import describe
    from scout_hf.eval.plan import measure as measures

    found, facts = measures.measure(tell)
    found.save(out, facts=facts, machine_was=describe())
    for name, value in facts.items():
        tell(f"{name:<18} {value:.4g}")
    tell(f"wrote {out}")


def check(record: Path, machine: Path | None) -> None:
    """Print predictions beside what was measured."""
    if not record.is_file():
        raise MissingFileError(f"--check {record} is missing; give the JSON of `scout-hf bench methods` or cpu-decode")
    if machine is None:
        raise ConfigError(f"--check takes the constants of the machine that was measured: {NEEDED}")
    found, facts = Machine.load_with_facts(machine)
    if not facts.get("two_tier_layer_us", 0) > 0:
        raise ConfigError(f"{machine} has no measured two_tier_layer_us: {NEEDED}")
    from scout_hf.eval.plan import check as checks

    measured = read_record(record, "methods", "cpu_decode")
    tables.show(check_tables(checks.check(measured, found, facts)))


def show(options: Plan) -> None:
    """Print what every method would take."""
    given = {name: getattr(options, flag[2:].replace("-", "_")) for name, flag in FLAGS.items()}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{FLAGS[name]} {value:g} is not allowed: a number above 0")
    gpu = options.gpu
    if options.machine is None and gpu not in MACHINES:
        raise ConfigError(f"--gpu {gpu} is not known; there are {', '.join(MACHINES)}. For another machine {NEEDED}")
    where = replace(MACHINES[gpu] if options.machine is None else Machine.load(options.machine), **given)
    ScoutConfig(budget=options.budget, block_size=options.block_size)
    load = Load(options.context, options.batch, options.budget, options.block_size, options.cpu_ratio)
    tables.show(plan_tables(_shape(options.model), where, load))


def _shape(model: str) -> ModelShape:
    if model in SHAPES:
        return SHAPES[model]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"--model {model} is neither known nor a config.json; known are {', '.join(SHAPES)}; for another model "
            "give its config.json, or the folder that holds it; no weights are needed"
        )
    # Of transformers, which writes infinities too.
    return ModelShape.of(read_json(path, _config, "give the config.json of a decoder", infinite=True), path.parent.name)


def _config(value: Any) -> None:
    fields({}, {"text_config": fields({}), "layer_types": items(text(200), most=1 << 14)})(value)
