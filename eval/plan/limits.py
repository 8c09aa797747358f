"""What a million tokens and more take, by the planner: the tables of ``docs/limits.md``.

``python -m scout_hf.eval.plan.limits PAGE`` makes them again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from scout_hf.eval.markdown import to_markdown, update
from scout_hf.eval.tables import Grid, short, three
from scout_hf.planner import GIB, MACHINES, SHAPES, Load, Machine, ModelShape, Plan, plan

COMMAND = "python -m scout_hf.eval.plan.limits"
SMALL, LARGE = SHAPES["llama-3-8b"], SHAPES["llama-3-70b"]
CONTEXTS = (131072, 1_000_000, 2_000_000, 4_000_000, 10_000_000)
RANKS, REDUCE_US = 8, 20
"""GPUs of a server, and microseconds of one of the two reductions of a layer."""
CHUNK = 8192
"""Tokens of a prompt that are read at once."""
DISK_GBPS = 6.0
"""NVMe, reads of a block each."""
SESSIONS = 100

GPU = replace(MACHINES["h100"], name="one H100, 2 TiB", host_gib=2048, layer_us=20)
SERVER = replace(GPU, name="8 H100, 2 TiB", host_gib=2048 / RANKS, cpu_gbps=400 / RANKS, layer_us=20 + 2 * REDUCE_US)
CPU = Machine("CPU, 2 TiB", 2048, 2048, 250, 250, 250, 250, 5, 100, 1000, 50, 10, 250, gpu=False)
WAYS = ((CPU, SMALL, 1), (GPU, SMALL, 1), (SERVER, LARGE, RANKS))

DIGESTS = "digests"
CAUSES = {
    "weights": "weights",
    "overhead": "launches",
    "attention": "attention",
    "selection": "reading digests",
    "waiting": "the CPU's share and the link",
}


def contexts() -> Iterator[Grid]:
    """A step of one row, by context and machine."""
    names = ("tokens", "KV GiB", "digests GiB", "per GPU GiB", "step ms", "the most of it", "gives out")
    table = Grid("", ("machine", "model", *names), 2)
    for machine, whole, ranks in WAYS:
        for context in CONTEXTS:
            shape, load = whole.shard(ranks), Load(context)
            found = plan("scout", shape, machine, load)
            held = context * shape.full * shape.kv_bytes * ranks
            most = max(found.parts, key=found.parts.__getitem__)
            table.add(
                machine.name, whole.name, _tokens(context), f"{held / GIB:.0f}",
                f"{_digests(found, shape, machine, load) * ranks / GIB:.1f}",
                f"{found.device_bytes / GIB:.1f}" if machine.gpu else "-", three(found.step_ms), CAUSES[most],
                _gives_out(found, machine),
            )  # fmt: skip
    yield table


def _digests(found: Plan, shape: ModelShape, machine: Machine, load: Load) -> float:
    """Bytes: what is held beside weights, residents and KV."""
    kv = load.context * shape.full * shape.kv_bytes
    beside = load.budget * shape.full * shape.kv_bytes if machine.gpu else kv
    return found.device_bytes - shape.weights - beside


def _gives_out(found: Plan, machine: Machine) -> str:
    tiers = (
        ("memory of the GPU", found.device_bytes, machine.device_gib),
        ("memory of the host", found.host_bytes, machine.host_gib),
    )
    if not machine.gpu:
        tiers = (("memory", found.device_bytes, machine.device_gib),)
    return " and ".join(name for name, held, there in tiers if held > there * GIB) or "-"


def prefill_seconds(shape: ModelShape, machine: Machine, ranks: int, context: int) -> tuple[float, float]:
    """Seconds of arithmetic of a prompt, and of reading the past from the host for every chunk."""
    products = 2 * (shape.layers * shape.layer_weights / shape.item) * context
    attention = shape.full * 4 * shape.heads * shape.head_dim * context**2 / 2
    past = shape.full * shape.kv_bytes * context**2 / (2 * CHUNK)
    return (products + attention) / ranks / machine.products_tflops / 1e12, past / ranks / machine.link_gbps / 1e9


def prefills() -> Iterator[Grid]:
    """Hours until the first token."""
    table = Grid("", ("machine", "model", "tokens", "arithmetic", "KV of the past over the link"), 2)
    for machine, shape, ranks in WAYS:
        for context in CONTEXTS:
            arithmetic, link = prefill_seconds(shape, machine, ranks, context)
            table.add(
                machine.name, shape.name, _tokens(context), _time(arithmetic), _time(link) if machine.gpu else "-"
            )
    yield table


def _tokens(count: int) -> str:
    return f"{count // 1_000_000}M" if count % 1_000_000 == 0 else short(count)


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{three(seconds / size)} {unit}"
    return f"{three(seconds)} s"


def sessions() -> Iterator[Grid]:
    """A hundred sessions on disk, and a hundred rows at once."""
    names = ("tokens each", "on disk TiB", "digests of one, GiB", "first step, all cold, ms", "new per step ms")
    table = Grid("", ("model", *names, "a batch of all: host TiB", "per GPU GiB", "step ms", "gives out"), 1)
    for context in (32768, 131072, 1_000_000):
        one, all_at_once = Load(context), Load(context, SESSIONS)
        kv = context * SMALL.full * SMALL.kv_bytes
        chosen = one.budget * SMALL.full * SMALL.kv_bytes
        found, batch = plan("scout", SMALL, GPU, one), plan("scout", SMALL, GPU, all_at_once)
        table.add(
            SMALL.name, _tokens(context), f"{SESSIONS * kv / 2**40:.2f}",
            f"{_digests(found, SMALL, GPU, one) / GIB:.2f}", three(chosen / DISK_GBPS / 1e6),
            three(one.recalled * chosen / DISK_GBPS / 1e6), f"{batch.host_bytes / 2**40:.2f}",
            f"{batch.device_bytes / GIB:.0f}", three(batch.step_ms), _gives_out(batch, GPU),
        )  # fmt: skip
    yield table


def made() -> dict[str, str]:
    """The page's tables by the command that makes them."""
    parts: dict[str, Iterable[Grid]] = {"contexts": contexts(), "prefills": prefills(), "sessions": sessions()}
    return {f"{COMMAND} {name}": to_markdown(part) for name, part in parts.items()}


def main(page: str) -> None:
    """Make the tables of a page again."""
    for command, text in made().items():
        update(Path(page), command, text)


if __name__ == "__main__":
    main(*sys.argv[1:])
