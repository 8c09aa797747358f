"""The tables that ``print(stats)`` shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from scout_hf.stats import Fidelity, LayerStats, Stats


def tables(stats: Stats) -> Iterator[Table]:
    """The tables of ``print(stats)``, in order."""
    from rich.table import Table

    kind = "exact" if stats.exact else "approximate"
    head = Table(title=f"scout_hf: {stats.method} ({kind})", show_header=False, title_justify="left")
    share = stats.attended_tokens / stats.context_tokens if stats.context_tokens else 1.0
    drafts = _drafts_included(stats)
    steps, of = (f"{stats.steps}, {stats.drafted_tokens} drafts included", " of text") if drafts else (stats.steps, "")
    head.add_row("decode steps", f"{steps}{_speed(stats.decode_tokens_per_second, of)}")
    head.add_row("prefilled tokens", f"{stats.prefill_tokens}{_speed(stats.prefill_tokens_per_second)}")
    if stats.found_tokens or stats.kept_tokens:
        head.add_row("prefix store", f"{stats.found_tokens} tokens found, {stats.kept_tokens} added")
    if stats.acceptance is not None:
        accepted = f"{stats.accepted_tokens} of {stats.drafted_tokens} accepted ({stats.acceptance:.0%})"
        head.add_row("drafts", f"{accepted}; {stats.tokens_per_exact_pass:.2f} tokens per exact pass")
    attended = f"{stats.attended_tokens:.0f} of {stats.context_tokens:.0f} ({share:.1%}){drafts}"
    head.add_row("attended per step", attended if stats.steps else "nothing decoded")
    head.add_row("KV of the newest cache", _by_tier(stats.kv_bytes) or "-")
    number = f"{stats.alive_caches} {'cache' if stats.alive_caches == 1 else 'caches'}"
    head.add_row("KV held now", f"{_by_tier(stats.alive_bytes)} ({number})" if stats.alive_caches else "nothing")
    if stats.huge_page_bytes:
        head.add_row("on huge pages", in_bytes(stats.huge_page_bytes))
    if stats.cpu_ratio is not None:
        head.add_row("CPU share of selection", f"{stats.cpu_ratio:.1%}")
    if _waits(stats):
        head.add_row("wait for CPU and link", f"{stats.join_wait_ms:.2f} ms per step{drafts}")
    if stats.recalled_bytes:
        blocks = f"{stats.recalled_blocks} blocks, " if stats.recalled_blocks else ""
        head.add_row(
            "brought to the device", f"{blocks}{in_bytes(stats.recalled_bytes)} in {stats.steps} steps{drafts}"
        )
    if stats.cosine is not None:
        head.add_row("predicted to real query", f"cosine {stats.cosine:.3f}")
    if stats.fidelity is not None:
        _add_fidelity(stats.fidelity, head)
    for reason, passes in stats.stock_passes.items():
        head.add_row("stock attention", f"{passes} pass{'es' if passes > 1 else ''}: {reason}")
    for note in stats.notes:
        head.add_row("note", note)
    yield head
    if _waits(stats):
        yield _layer_table(stats)
    if stats.fidelity is not None:
        yield _fidelity_table(stats)


def _drafts_included(stats: Stats) -> str:
    return ", drafts included" if stats.drafted_tokens else ""


def _speed(tokens_per_second: float | None, of: str = "") -> str:
    if tokens_per_second is None:
        return ""
    return f", {tokens_per_second:,.{1 if tokens_per_second < 100 else 0}f} tokens/s{of}"


def _by_tier(held: dict[str, int]) -> str:
    return ", ".join(f"{tier} {in_bytes(count)}" for tier, count in held.items())


def _waits(stats: Stats) -> bool:
    return stats.cpu_ratio is not None or stats.join_wait_ms > 0


def _add_fidelity(found: Fidelity, head: Table) -> None:
    head.add_row("captured", f"attention mass {found.mass:.3f}, output error {percent(found.output_error)}")
    if found.prediction_error is not None:
        parts = (found.selection_error, found.prediction_error)
        head.add_row("error by its cause", "selection {}, predicted query {}".format(*map(percent, parts)))
    skipped = f", {found.skipped} skipped" if found.skipped else ""
    head.add_row("looked at", f"{found.samples} samples{skipped}; {found.cost_ms:.2f} ms of CPU per step")


def _fidelity_table(stats: Stats) -> Table:
    from rich.table import Table

    table = Table(title="what was lost", title_justify="left")
    for name in ("layer", "mass", "error", "selection", "prediction", "recall", "samples"):
        table.add_column(name, justify="right")
    for layer in stats.layers:
        if (found := layer.fidelity) is not None:
            table.add_row(
                str(layer.layer),
                f"{found.mass:.3f}",
                percent(found.output_error),
                percent(found.selection_error),
                "-" if found.prediction_error is None else percent(found.prediction_error),
                "-" if found.block_recall is None else f"{found.block_recall:.3f}",
                str(found.samples),
            )
    return table


def _layer_table(stats: Stats) -> Table:
    from rich.table import Table

    columns: dict[str, Callable[[LayerStats], str | None]] = {
        "layer": lambda layer: str(layer.layer),
        "attended": lambda layer: f"{layer.attended_tokens:.0f}",
        "CPU share": lambda layer: None if layer.cpu_ratio is None else f"{layer.cpu_ratio:.1%}",
        "cosine": lambda layer: None if layer.cosine is None else f"{layer.cosine:.3f}",
        "wait ms": lambda layer: f"{layer.join_wait_ms:.2f}",
        "brought": lambda layer: in_bytes(layer.recalled_bytes) if layer.recalled_bytes else None,
    }
    cells = {name: [say(layer) for layer in stats.layers] for name, say in columns.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    table = Table(title=f"per layer{_drafts_included(stats)}", title_justify="left")
    for name in cells:
        table.add_column(name, justify="right")
    for row in zip(*cells.values()):
        table.add_row(*(text or "-" for text in row))
    return table


def percent(share: float) -> str:
    """A share in percent; below 0.1 % in powers of ten, so that rounding errors are visible as such."""
    return f"{share:.1%}" if share >= 0.001 or share == 0 else f"{share:.0e}"


def in_bytes(count: float) -> str:
    """A number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
