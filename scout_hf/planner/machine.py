"""Rates and memory of a machine, from data sheets or measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from scout_hf import rules
from scout_hf.errors import ConfigError
from scout_hf.files import read_json, write_text
from scout_hf.rules import flag, number, table, text

LARGEST = 1e12
"""Upper limit of any constant."""
LARGEST_FILE = 1 << 20
# Share of a data sheet's bandwidth and arithmetic that kernels reach.
REACHED = {"weights": 0.85, "attention": 0.8, "scoring": 0.7, "products": 0.6}


@dataclass(frozen=True)
class Machine:
    """Constants of a machine.

    Attributes
    ----------
    name : str
    device_gib, host_gib : float
        Memory of the device and of the host in GiB. Without a GPU only ``device_gib`` counts.
    weights_gbps, attend_gbps, score_gbps : float
        GB/s at which the device reads weights in a step, KV in attention, and digests in scoring.
    stock_gbps : float
        GB/s of KV of stock attention with its cache; on a CPU, where it copies keys and values for every query head, of
        a model with 4 query heads per KV head.
    products_tflops : float
        Of matrix products with many rows.
    layer_us, step_us : float
        Other microseconds per layer and per step: launches, Python, norms.
    link_gbps, link_us : float
        Host-to-device bandwidth in GB/s, and latency of a transfer in microseconds.
    cpu_gbps : float
        GB/s of KV in CPU attention.
    gpu : bool
        False for a machine without a GPU: one tier, no link.

    Raises
    ------
    ConfigError
        For a constant that is not a number above 0.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from scout_hf.planner import MACHINES
    >>> replace(MACHINES["h100"], name="h100 with slow link", link_gbps=12.0).link_gbps
    12.0
    """

    name: str
    device_gib: float
    host_gib: float
    weights_gbps: float
    attend_gbps: float
    score_gbps: float
    stock_gbps: float
    products_tflops: float
    layer_us: float
    step_us: float
    link_gbps: float
    link_us: float
    cpu_gbps: float
    gpu: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            known = isinstance(value, (int, float)) and not isinstance(value, bool)
            if field.type in ("float", float) and not (known and 0 < value <= LARGEST):
                raise ConfigError(
                    f"{field.name}={value!r} is not allowed: take a number above 0; try the value of a known "
                    "machine, such as h100, or what `scout-hf plan --measure` finds"
                )

    def save(self, path: Path, **facts: Any) -> None:
        """Write the constants and further ``facts`` to a JSON file."""
        write_text(path, json.dumps({"machine": asdict(self), **facts}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Machine:
        """Read a file that ``save`` wrote; ConfigError if it is missing or not valid."""
        return cls.load_with_facts(path)[0]

    @classmethod
    def load_with_facts(cls, path: Path) -> tuple[Machine, dict[str, float]]:
        """As ``load``, and the further facts in the file."""
        held = {field.name: number(1e-12, LARGEST) for field in fields(cls)} | {"name": text(200), "gpu": flag}
        gpu = {"gpu": held.pop("gpu")}
        rule = rules.fields({"machine": rules.fields(held, gpu, closed=True)}, {"facts": table(number())})
        data = read_json(path, rule, "make a machine with `scout-hf plan --measure`", LARGEST_FILE)
        return cls(**data["machine"]), data.get("facts", {})


def _gpu(name: str, memory: float, bandwidth: float, tflops: float, link: float) -> Machine:
    return Machine(
        name, memory, 512, bandwidth * REACHED["weights"], bandwidth * REACHED["attention"],
        bandwidth * REACHED["scoring"], bandwidth * REACHED["attention"], tflops * REACHED["products"], 300, 1000, link,
        10, 100,
    )  # fmt: skip


MACHINES = {
    machine.name: machine
    for machine in (
        _gpu("h200", 141, 4800, 989, 50), _gpu("h100", 80, 3350, 989, 50), _gpu("a100-80", 80, 2039, 312, 24),
        _gpu("a100-40", 40, 1555, 312, 24), _gpu("l40s", 48, 864, 362, 24), _gpu("rtx-5090", 32, 1792, 210, 50),
        _gpu("rtx-4090", 24, 1008, 165, 24), _gpu("rtx-3090", 24, 936, 71, 24),
    )
}  # fmt: skip
"""Known machines by name. From data sheets: memory, and bandwidth and dense bf16 arithmetic times the share that
kernels reach. Assumed: practical PCIe bandwidth, 100 GB/s of CPU attention (ScoutAttention), and 0.3 ms of launches
per layer (plain transformers). Measured values are better: ``scout-hf plan --measure``."""
