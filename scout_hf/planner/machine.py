"""What a machine can do: rates and memory, from data sheets or measured."""

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
"""Of any constant."""
LARGEST_FILE = 1 << 20
# What kernels reach of a data sheet's bandwidth and arithmetic.
REACHED = {"weights": 0.85, "attention": 0.8, "scoring": 0.7, "products": 0.6}


@dataclass(frozen=True)
class Machine:
    """Constants of a machine.

    Attributes
    ----------
    name : str
    device_gib, host_gib : float
        Memory beside the model, and of the host; equal memory counts once on a machine without a GPU.
    weights_gbps, attend_gbps, score_gbps : float
        GB/s at which the device reads weights in a step, KV in attention, and digests in scoring.
    stock_gbps : float
        GB/s of KV of stock attention with its cache; on a CPU, where it copies keys and values for every query head, of
        a model with 4 query heads per KV head.
    products_tflops : float
        Of matrix products with many rows.
    layer_us, step_us : float
        What a layer and a step cost besides: launches, Python, norms.
    link_gbps, link_us : float
        Host to device, and what a transfer takes to begin.
    cpu_gbps : float
        GB/s of KV that the host attends.
    gpu : bool
        Without one there is one tier, and nothing crosses a link.
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
                    f"{field.name}={value!r} is not allowed: a number above 0; try that of a machine there is, such as "
                    f"h100 or what `scout-hf plan --measure` finds"
                )

    def save(self, path: Path, **facts: Any) -> None:
        """Write as JSON, with more facts beside the constants."""
        write_text(path, json.dumps({"machine": asdict(self), **facts}, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Machine:
        """Read what ``save`` wrote; ConfigError if it is something else, or not there."""
        return cls.load_with_facts(path)[0]

    @classmethod
    def load_with_facts(cls, path: Path) -> tuple[Machine, dict[str, float]]:
        """The same, and the facts that it was saved with, none or more."""
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
"""By name: data-sheet memory, bandwidth and dense bf16 arithmetic times what kernels reach of them; PCIe as it goes in
practice; 100 GB/s of attention on the CPU and 0.3 ms of launches per layer, the figures of ScoutAttention and of plain
transformers. Better measured."""
