"""Compares the planner's predictions with measurements of the same machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from scout_hf.eval.arms import PREDICTED
from scout_hf.planner import Load, Machine, ModelShape, plan

WAYS = {name: name for name in ("stock", "hgca", "infinigen", "kvpr", "dense")} | {PREDICTED: "scout"}


class Row(NamedTuple):
    """One step, measured and predicted."""

    what: str
    model: str
    context: int
    batch: int
    measured_ms: float
    predicted_ms: float

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted_ms / self.measured_ms - 1


def check(record: dict[str, Any], machine: Machine, facts: dict[str, Any]) -> list[Row]:
    """All steps of a record of ``scout-hf bench methods`` or ``cpu-decode`` that the planner can predict.

    Machine and facts are what :func:`scout_hf.eval.plan.measure.measure` gave, with as many threads as the record's.
    ValueError for another record.
    """
    kinds = {"methods": _methods, "cpu_decode": _cpu_decode}
    kind = record.get("benchmark")
    if kind not in kinds:
        raise ValueError(f"a record of {kind!r} cannot be checked; those of {', '.join(kinds)} can")
    return list(kinds[kind](record, machine, facts))


def _cpu_decode(record: dict[str, Any], machine: Machine, facts: dict[str, Any]) -> Iterator[Row]:
    shape = ModelShape.of(record["model"], "measured")
    for row in record["contexts"]:
        load = Load(max(8, row["context"]), 1, record["settings"]["budget"], record["settings"]["block_size"])
        for way in ("stock", "scout"):
            predicted = plan(way, shape, machine, load).step_ms
            yield Row(way, "", row["context"], 1, row["modes"][way]["median_ms"], predicted)


def _methods(record: dict[str, Any], machine: Machine, facts: dict[str, Any]) -> Iterator[Row]:
    from scout_hf.eval.bench.models import SHAPE
    from scout_hf.eval.methods.speed import SHAPES

    settings = record["settings"]
    link, cpu = settings["emulation"]["link_gbps"], settings["emulation"]["cpu_gbps"]
    # Two tiers in one memory: torch computes on the one, the other and the link are emulated.
    tiers = replace(
        machine,
        gpu=True,
        layer_us=facts["two_tier_layer_us"],
        link_gbps=link or machine.link_gbps,
        cpu_gbps=cpu or machine.cpu_gbps,
    )
    for cell in record["cells"]:
        if cell["part"] not in ("speed", "equal") or "step_ms" not in cell or cell["way"] not in WAYS:
            continue
        sizes = SHAPE | {"num_hidden_layers": settings["layers"], "vocab_size": 1024} | SHAPES[cell["shape"]]
        shape = ModelShape.of(sizes, "measured")
        ratio = cell.get("cpu_ratio") or 0.1
        chosen = cell["batch"] * min(settings["budget"], cell["context"]) * shape.kv_bytes * shape.layers
        recalled = cell.get("link_bytes", 0.0) / chosen
        load = Load(
            cell["context"], cell["batch"], settings["budget"], settings["block_size"], ratio, recalled=recalled
        )
        where = machine if cell["way"] == "stock" else tiers
        predicted = plan(WAYS[cell["way"]], shape, where, load).step_ms
        yield Row(cell["way"], cell["shape"], cell["context"], cell["batch"], cell["step_ms"], predicted)
