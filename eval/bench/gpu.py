"""Everything about a GPU in a given time, in stages: each in a process of its own, and on disk as soon as it is known.

``gpu.json`` is written after every cell, ``gpu.txt``, its table, after every stage, and ``logs`` has what the stages
wrote. A later run goes on ``--from`` a stage: what it has of the stages before is kept, and of the others what the same
code has measured. Stages before that had no time come last.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import scout_hf
from scout_hf.eval import tables
from scout_hf.eval.bench import gpu_report
from scout_hf.eval.bench.gpu_process import Watched
from scout_hf.eval.bench.gpu_stages import STAGES, Stage, find_stage, why_none
from scout_hf.eval.bench.options import Gpu, Tell, silent
from scout_hf.eval.records import Record
from scout_hf.eval.rules import GPU as RULE
from scout_hf.eval.rules import GPU_FORMAT as FORMAT
from scout_hf.files import put_in_place, write_text

SPARE_SECONDS = 3.0
"""For the table, and for what a process takes to die."""
MOST_PROCESSES = 4
"""Of one stage: a job that ends its process is left out in the next one."""
MOST_PATIENCE = 60.0
NAME = "gpu"


def run(
    asked: Gpu, tell: Tell = silent, stages: Sequence[Stage] = STAGES, now: Callable[[], float] = time.monotonic
) -> dict[str, Any]:
    """Run the stages; the record. ValueError for an option that is not allowed, ConfigError for a file that is not."""
    end = now() + asked.seconds - SPARE_SECONDS
    stages = sorted(stages, key=lambda stage: asked.device == "cpu" and stage.late_on_cpu)
    first = 0 if asked.begin is None else find_stage(asked.begin, stages)
    book = _Book(asked, stages, first)
    for stage in (*stages[first:], *stages[:first]):
        if stage in stages[:first] and not book.wants(stage, end - now()):
            continue
        why = book.why_not(stage, end - now())
        if why is None:
            tell(f"{stage.name}: {stage.about}, at most {min(stage.most, end - now()):.0f} s")
            begun = now()
            why = _run_stage(stage, book, end, now)
            book.close(stage, why, now() - begun)
        else:
            book.leave_out(stage, why)
        tell(f"{stage.name}: {book.stage(stage.name)['state']}{f', {why}' if why else ''}")
    return book.held


def show(record: dict[str, Any], console: Console | None = None) -> None:
    """Print the table of a record, at most 60 lines."""
    tables.show(gpu_report.gpu_tables(record), console=console)


def _run_stage(stage: Stage, book: _Book, end: float, now: Callable[[], float]) -> str | None:
    """Run a stage, in further processes where a job ends one; why it is not whole, or None."""
    last, tries, reasons = min(end, now() + stage.most), dict[str, int](), list[str]()
    for _ in range(MOST_PROCESSES):
        left = last - now()
        if reasons and left < stage.least:
            break
        given = {"settings": book.held["settings"], "until": time.time() + left, "logs": str(book.logs)}
        given |= {"known": book.known(), "tries": tries, "done": book.done(stage.name)}
        watched = Watched(stage.jobs, given, book.logs / f"{stage.name}.log")
        patience = min(MOST_PATIENCE, max(2.0, end - now()))
        why = watched.follow(left, lambda message: book.hear(stage.name, message), patience)
        if why is None:
            return reasons[0] if reasons else None
        reasons.append(why)
        if watched.running is None:
            break
        tries[watched.running] = tries.get(watched.running, 0) + 1
        book.died(stage.name, watched.running, why)
    return reasons[0]


class _Book:
    """The record of all runs in a folder."""

    def __init__(self, asked: Gpu, stages: Sequence[Stage], first: int):
        self.logs = asked.out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        path = asked.out / f"{NAME}.json"
        settings = {name: getattr(asked, name) for name in ("device", "layers", "budget", "digest", "drift", "seed")}
        held = {"benchmark": NAME, "format": FORMAT, "settings": settings, "machine": {}, "stages": [], "cells": []}
        if asked.begin is None and path.exists():
            put_in_place(path, path.with_name(f"{NAME}-{time.strftime('%Y%m%d-%H%M%S')}.json"))
        self._record = Record(path, False, held, RULE, _settings, ("machine", "stages", "cells"))
        self.held, self._text, self.code = self._record.held, asked.out / f"{NAME}.txt", _code()
        self._plans: dict[str, list[str]] = {}
        self._stages, self._on_gpu = stages, asked.device != "cpu"
        known = {one["stage"] for one in self.held["stages"]}
        for stage in stages[first:]:
            missing = [name for name in stage.needs if name not in known and find_stage(name, stages) < first]
            if missing:
                raise ValueError(
                    f"--from {asked.begin}: {stage.name} needs {missing[0]}, which {path} does not have; "
                    f"try --from {missing[0]}"
                )
        names = {stage.name for stage in stages[first:]}
        self.held["stages"] = [one for one in self.held["stages"] if one["stage"] not in names]
        # What other code has measured, or what failed, is measured again.
        self.held["cells"] = [one for one in self.held["cells"] if one["stage"] not in names or self._holds(one)]
        self._record.write()

    def _holds(self, cell: dict[str, Any]) -> bool:
        return cell["code"] == self.code and not why_none(cell) and not cell.get("unfinished")

    def stage(self, name: str) -> dict[str, Any]:
        """What is known of a stage; without a state if nothing is."""
        return next((one for one in self.held["stages"] if one["stage"] == name), {"stage": name})

    def why_not(self, stage: Stage, left: float) -> str | None:
        """Why a stage cannot begin."""
        if not self._on_gpu and not stage.on_cpu:
            return "needs a GPU"
        for name in stage.needs:
            if self.stage(name).get("state") not in ("done", "in part"):
                return f"{name} failed" if self.stage(name).get("state") == "failed" else f"{name} was not run"
        if left < stage.least:
            return f"no time left: it takes {stage.least:.0f} s, and there are {max(0, left):.0f}"
        return None

    def wants(self, stage: Stage, left: float) -> bool:
        """Whether a stage before ``--from`` was not run or cut short, and would come further in the time left."""
        before = self.stage(stage.name)
        cut = any(one.get("unfinished") for one in self.held["cells"] if one["stage"] == stage.name)
        late = before.get("state") == "not run" or (cut and left > before.get("seconds", 0.0))
        return late and self.why_not(stage, left) is None

    def known(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What is known of all stages, by stage and job."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for one in self.held["cells"]:
            found.setdefault(one["stage"], {})[one["cell"]] = one
        return found

    def done(self, stage: str) -> list[str]:
        """Jobs of a stage that are not to run."""
        return [one["cell"] for one in self.held["cells"] if one["stage"] == stage and not one.get("unfinished")]

    def hear(self, stage: str, message: dict[str, Any]) -> None:
        """Keep what a process says."""
        if "plan" in message:
            self._plans[stage] = message["plan"]
        elif "end" in message:
            if "machine" in message["found"]:
                self.held["machine"] = message["found"].pop("machine")
            self._add(stage, message["end"], message["found"])
        elif "so_far" in message:
            self._add(stage, message["so_far"], message["found"] | {"unfinished": True})

    def died(self, stage: str, cell: str, why: str) -> None:
        """A job took its process with it; what it has told so far is kept."""
        before = self._record.at({"stage": stage, "cell": cell})
        kept = {name: value for name, value in (before[0] if before else {}).items() if name != "unfinished"}
        self._add(stage, cell, kept | {"failed": why})

    def _add(self, stage: str, cell: str, found: dict[str, Any]) -> None:
        self._record.add({"stage": stage, "cell": cell}, found | {"code": self.code})

    def close(self, stage: Stage, why: str | None, seconds: float) -> None:
        """Say how a stage went: ``done``, ``in part``, or ``failed`` if nothing of it can be relied on."""
        cells = [one for one in self.held["cells"] if one["stage"] == stage.name]
        right = [one for one in cells if not why_none(one)]
        bad = [one for one in cells if {"failed", "oom"} & set(one) or one.get("failures") or one.get("unfinished")]
        left = [name for name in self._plans.get(stage.name, ()) if name not in {one["cell"] for one in cells}]
        state = "failed" if not right else "in part" if bad or left or why else "done"
        told = why or (f"{bad[0]['cell']}: {why_none(bad[0])}" if bad and not right else None)
        self._keep({"stage": stage.name, "state": state, "why": told, "left": left, "seconds": round(seconds, 1)})

    def leave_out(self, stage: Stage, why: str) -> None:
        """Say why a stage did not begin."""
        self._keep({"stage": stage.name, "state": "not run", "why": why, "left": [], "seconds": 0.0})

    def _keep(self, found: dict[str, Any]) -> None:
        order = {stage.name: place for place, stage in enumerate(self._stages)}
        kept = [one for one in self.held["stages"] if one["stage"] != found["stage"]]
        self.held["stages"] = sorted([*kept, found], key=lambda one: order.get(one["stage"], len(order)))
        self._record.write()
        text = io.StringIO()
        show(self.held, Console(file=text, width=gpu_report.WIDTH, markup=False, emoji=False))
        write_text(self._text, text.getvalue())


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    return record["settings"]


def _code() -> str:
    """Which code measures: a hash of the package's sources."""
    home, seen = Path(scout_hf.__file__).parent, hashlib.blake2b(digest_size=6)
    for folder in (home, Path(gpu_report.__file__).parents[1]):
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h")):
            seen.update(path.read_bytes())
    return seen.hexdigest()
