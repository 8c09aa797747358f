"""What a benchmark found, as tables, as JSON and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from scout_hf.eval import tables
from scout_hf.eval.bench import cpu_report, drafts_report, rivals_report, sessions_report
from scout_hf.eval.methods import plots as method_plots
from scout_hf.eval.methods import tables as method_tables
from scout_hf.eval.records import write_record
from scout_hf.files import whole_file

NO_PLOT = "no plot: it takes matplotlib, which pip install 'scout_hf[bench]' brings"
MACHINE = "{cpu} ({isa}), {threads} of {cpus} CPUs, torch {torch}, transformers {transformers}, scout_hf {scout_hf}"
TABLES = {
    "cpu_kernel": cpu_report.kernel_tables,
    "cpu_decode": cpu_report.decode_tables,
    "sessions": sessions_report.tables,
    "rivals": rivals_report.tables,
    "drafts": drafts_report.tables,
    "methods": method_tables.tables,
}
PLOTS = {
    "cpu_kernel": cpu_report.plot_kernel,
    "cpu_decode": cpu_report.plot_decode,
    "sessions": sessions_report.plot,
    "rivals": rivals_report.plot,
    "drafts": drafts_report.plot,
    "methods": method_plots.plot,
}


def show(record: dict[str, Any], console: Console | None = None) -> None:
    """Print the record of a benchmark."""
    tables.show(TABLES[record["benchmark"]](record), _machine(record), console)


def save(record: dict[str, Any], folder: Path) -> list[str]:
    """Write ``<benchmark>.json`` and ``.png`` into a folder; lines that say what was written."""
    name = record["benchmark"]
    path = folder / f"{name}.json"
    write_record(record, path)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return [f"wrote {path}", NO_PLOT]
    figure = Figure(figsize=(12, 4.6), layout="constrained", dpi=150)
    PLOTS[name](record, figure)
    figure.supxlabel(_machine(record), fontsize=7, color="#666666")
    return [f"wrote {path}", save_figure(figure, path.with_suffix(".png"))]


def save_figure(figure: Any, path: Path) -> str:
    """Write a figure as PNG, all of it or nothing; the line that says so."""
    with whole_file(path, binary=True) as file:
        figure.savefig(file, format="png")
    return f"wrote {path}"


def _machine(record: dict[str, Any]) -> str:
    return MACHINE.format(threads=record["settings"]["threads"], **record["machine"])
