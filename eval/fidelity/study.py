"""The study of ``scout-hf fidelity``: cells measured by several processes; interrupted runs resume; JSON and plots."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

import scout_hf
from scout_hf import ConfigError
from scout_hf.diagnostics import usable_cpus
from scout_hf.eval.bench.machine import describe
from scout_hf.eval.fidelity import report
from scout_hf.eval.fidelity.cells import MODES, QUICK, WHOLE, Cell, Effort, cells_of, keep, parse_filters, weight
from scout_hf.eval.fidelity.measure import measure
from scout_hf.eval.fidelity.options import Fidelity
from scout_hf.eval.fidelity.plots import save_plots
from scout_hf.eval.fidelity.subjects import available
from scout_hf.eval.records import Journal

BAR = "{desc} |{bar}| {percentage:3.0f}% {elapsed}, about {remaining} left"


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {
        "scout_hf": scout_hf.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def asked_of(cell: Cell, effort: Effort, weights: str) -> dict[str, Any]:
    """All that a result must have been measured for, to count as this cell's; defaults of the config may change."""
    try:
        config = cell.config()
    except ConfigError:
        config = None  # the cell will fail, and say why
    return {
        "cell": cell.as_dict(),
        "effort": effort.of(cell),
        "config": config and asdict(config),
        "versions": versions(),
        "weights": weights,
    }


def run(
    cells: Sequence[Cell],
    effort: Effort,
    weights: dict[str, str],
    journal: Journal,
    jobs: int,
    tell: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
    """Results of all cells that could be measured, in their order, each with its cell.

    What is in the journal is not measured again, and new results are added to it as they come in. ``weights`` are
    hashes by model; of ``jobs`` processes each has one thread of torch, and one is this process itself.
    """
    asked = {cell: asked_of(cell, effort, weights[cell.model]) for cell in cells}
    missing = [cell for cell in cells if journal.get(asked[cell]) is None]
    if len(missing) < len(cells):
        foreign = sum(journal.foreign(one) for one in asked.values())
        note = f", {foreign} of them with other code; --fresh measures them again" if foreign else ""
        tell(f"{len(cells) - len(missing)} of {len(cells)} cells are measured already{note}")
    bar = tqdm(total=sum(map(weight, missing)), bar_format=BAR, leave=False, disable=None if missing else True)
    with bar:
        done = 0
        bar.set_description(f"0/{len(missing)} cells")
        for cell, result in _measured(missing, effort, jobs):
            if not isinstance(result, Exception):
                try:
                    journal.add(asked[cell], result)
                except ValueError as error:  # a figure that is no number
                    result = error
            if isinstance(result, Exception):
                with bar.external_write_mode():
                    tell(f"failed: {cell}: {result!r}")
            done += 1
            bar.set_description(f"{done}/{len(missing)} cells", refresh=False)
            bar.update(weight(cell))
    found = [(cell, journal.get(asked[cell])) for cell in cells]
    return [{**cell.as_dict(), **result} for cell, result in found if result is not None]


def _measured(cells: Sequence[Cell], effort: Effort, jobs: int) -> Iterator[tuple[Cell, dict[str, Any] | Exception]]:
    if jobs == 1 or len(cells) < 2:
        for cell in cells:
            try:
                yield cell, measure(cell, effort)
            except Exception as error:
                yield cell, error
        return
    # Spawned, since a fork would copy torch's threads and locks in whatever state they are.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(jobs, len(cells)), context, initializer=_begin_worker) as pool:
        with _ctrl_c_waits():
            futures = {pool.submit(measure, cell, effort): cell for cell in cells}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise ValueError(
                        "a worker process died, perhaps for want of memory; run the same again with fewer --jobs"
                    ) from error
                yield futures[future], error or future.result()
        except BaseException:
            # What they have begun would be thrown away: nobody shall wait for it.
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Processes that begin within this never see Ctrl-C, from their first moment; the parent sees it afterwards."""
    resource_tracker.ensure_running()  # its own start would end this too early
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker() -> None:
    """One thread; Ctrl-C is the parent's; and no life after it."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


FIELDS = tuple(field.name for field in fields(Cell))
JOURNAL, RECORD = "cells.jsonl", "fidelity.json"


def study(options: Fidelity, tell: Callable[[str], Any]) -> dict[str, Any]:
    """Measure a study, or what of it is not in ``out`` yet, and write ``fidelity.json`` and plots there; the record.

    Results of single cells are kept in ``out`` as they come in.
    """
    quick, out, filters = options.quick, options.out, parse_filters(options.only)
    effort = replace(QUICK if quick else WHOLE, seed=options.seed)
    effort = replace(effort, questions=options.questions or effort.questions)
    weights = available()
    if not weights:
        raise FileNotFoundError("there are no models to ask: install scout_hf with its data files")
    cells = keep(cells_of(tuple(weights), quick), filters)
    out.mkdir(parents=True, exist_ok=True)
    machine = describe()
    try:
        journal = Journal(out / JOURNAL, report.RESULT, options.fresh, machine["commit"])
        if not options.fresh:
            adopt(journal, out / RECORD, effort, weights)
        results = run(cells, effort, weights, journal, options.jobs or len(usable_cpus()), tell)
    except KeyboardInterrupt:
        tell(f"stopped; what was measured is in {out / JOURNAL}, and the same command goes on from there")
        raise
    if not results:
        raise ValueError("no cell could be measured; see the lines above")
    record = {
        "study": "fidelity",
        "settings": {
            "preset": "quick" if quick else "full",
            "only": list(options.only),
            **asdict(effort),
            "modes": MODES,
        },
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
