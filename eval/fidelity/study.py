"""What ``scout-hf fidelity`` does, from its options to tables, JSON and plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from scout_hf.eval.bench.machine import describe
from scout_hf.eval.fidelity import grid, report
from scout_hf.eval.fidelity.cells import MODES, Cell, keep, parse_filters
from scout_hf.eval.fidelity.journal import Journal
from scout_hf.eval.fidelity.measure import Effort
from scout_hf.eval.fidelity.plots import save_plots
from scout_hf.eval.fidelity.run import asked_of, run, versions
from scout_hf.eval.fidelity.subjects import available

FIELDS = tuple(field.name for field in fields(Cell))
JOURNAL, RECORD = "cells.jsonl", "fidelity.json"


def study(
    quick: bool,
    only: Sequence[str],
    jobs: int,
    out: Path,
    seed: int,
    questions: int | None,
    fresh: bool,
    tell: Callable[[str], Any],
) -> dict[str, Any]:
    """Measure a study, or what of it is not in ``out`` yet, and write ``fidelity.json`` and plots there; the record.

    Parameters
    ----------
    quick : bool
        The small study, else the whole one.
    only : sequence of str
        Filters, such as ``digest=minmax,sign``; see :func:`scout_hf.eval.fidelity.cells.parse_filters`.
    jobs : int
        Processes.
    out : Path
        A folder; made if missing. Results of single cells are kept in it as they come in.
    seed, questions
        What documents are drawn from, and how many questions a cell has (None: as the preset says).
    fresh : bool
        Measure everything, whatever is there.
    tell : callable
        Gets lines for the user.
    """
    filters = parse_filters(only)
    effort = replace(grid.QUICK if quick else grid.WHOLE, seed=seed)
    if questions is not None:
        effort = replace(effort, questions=questions)
    weights = available()
    if not weights:
        raise FileNotFoundError("there are no models to ask: install scout_hf with its data files")
    cells = keep(grid.study(tuple(weights), quick), filters)
    out.mkdir(parents=True, exist_ok=True)
    machine = describe()
    try:
        journal = Journal(out / JOURNAL, fresh, machine["commit"])
        if not fresh:
            adopt(journal, out / RECORD, effort, weights)
        results = run(cells, effort, weights, journal, jobs, tell)
    except KeyboardInterrupt:
        tell(f"stopped; what was measured is in {out / JOURNAL}, and the same command goes on from there")
        raise
    if not results:
        raise ValueError("no cell could be measured; see the lines above")
    record = {
        "study": "fidelity",
        "settings": {"preset": "quick" if quick else "full", "only": list(only), **asdict(effort), "modes": MODES},
        "failed": len(cells) - len(results),
        "machine": machine,
        "weights": weights,
        "cells": results,
    }
    report.save(record, out / RECORD)
    for line in (f"wrote {out / RECORD}", *save_plots(record, out)):
        tell(line)
    return record


def adopt(journal: Journal, path: Path, effort: Effort, weights: dict[str, str]) -> int:
    """Take into a journal what it lacks and the record beside it has, such as one from a repository; how much that was.

    Only what was measured by the same versions with the same effort, weights and settings of a mode counts.
    """
    if not path.is_file():
        return 0
    record = report.load(path)
    if any(record["machine"].get(name) != version for name, version in versions().items()):
        return 0
    found = []
    for entry in record["cells"]:
        given = {name: entry.get(name) for name in FIELDS}
        if MODES.get(given["mode"], "unknown") != record["settings"].get("modes", {}).get(given["mode"], "no mode"):
            continue
        cell, hashed = Cell(**given), weights.get(given["model"])
        same = all(record["settings"].get(name) == value for name, value in effort.of(cell).items())
        if not same or hashed is None or record["weights"].get(cell.model) != hashed:
            continue
        asked = asked_of(cell, effort, hashed)
        if journal.get(asked) is None:
            found.append((asked, {name: value for name, value in entry.items() if name not in FIELDS}))
    journal.adopt(found, record["machine"].get("commit"))
    return len(found)
