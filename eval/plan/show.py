"""Plans and checks as tables for a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from scout_hf.eval.tables import Grid, short, three
from scout_hf.planner import GIB, Load, Machine, ModelShape, break_even, largest_batch, longest_context, methods, plan

if TYPE_CHECKING:
    from scout_hf.eval.plan.check import Row


ESTIMATE = "An estimate by arithmetic from sizes and given bandwidths; nothing here was measured on a GPU."


def plan_tables(shape: ModelShape, machine: Machine, load: Load):
    """What every method takes and gives."""
    yield ESTIMATE
    memory = f"{machine.device_gib:g} GiB"
    if machine.gpu:
        beside = f"link {machine.link_gbps:g} GB/s, CPU {machine.cpu_gbps:g} GB/s of KV"
        memory += f" and {machine.host_gib:g} on the host"
    else:
        beside = "no GPU"
    title = (
        f"{shape.name} on {machine.name} ({beside}; {memory}), {short(load.context)} tokens, batch {load.batch}; "
        "no times for what does not fit"
    )
    names = ("device GiB", "host GiB", "fits", "step ms", "tok/s", "wait", "beats stock from", "most rows")
    table = Grid(title, ("method", *names, "most tokens"))
    known = methods() if machine.gpu else ("stock", "scout")
    for method in known:
        one, start = plan(method, shape, machine, load), break_even(method, shape, machine, load)
        times = (
            three(one.step_ms),
            three(1e3 * load.batch / one.step_ms),
            f"{one.parts.get('waiting', 0.0) / one.step_ms:.0%}",
        )
        table.add(
            method,
            f"{one.device_bytes / GIB:.1f}",
            f"{one.host_bytes / GIB:.1f}",
            "yes" if one.fits else "no",
            *(times if one.fits else "---"),
            "-" if method == "stock" else "never" if start is None else short(start),
            str(largest_batch(method, shape, machine, load)),
            short(longest_context(method, shape, machine, load) // 1024 * 1024),
        )
    yield table
    notes = {f"{method}: {plan(method, shape, machine, load).note}" for method in known}
    yield from sorted(note for note in notes if not note.endswith(": "))


def check_tables(rows: Sequence[Row]):
    """Predicted beside measured, and the errors."""
    title = "a step, measured and predicted; + is predicted slower than it was"
    table = Grid(title, ("way", "model", "tokens", "batch", "measured ms", "predicted ms", "error"), 2)
    for row in rows:
        size = (short(row.context), str(row.batch), three(row.measured_ms), three(row.predicted_ms))
        table.add(row.what, row.model, *size, f"{row.error:+.0%}")
    yield table
    errors = [abs(row.error) for row in rows]
    yield f"error: median {statistics.median(errors):.0%}, largest {max(errors):.0%}, {len(rows)} steps"
