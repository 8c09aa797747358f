"""The tests of the GPU and of its kernels as stages of ``bench gpu``: several processes, and a limit for each test."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import scout_hf
from scout_hf.diagnostics import usable_cpus
from scout_hf.eval.bench import gpu_pytest
from scout_hf.eval.bench.gpu_stages import Given, Job

ROOT = Path(scout_hf.__file__).parents[1]
TEST_SECONDS, START_SECONDS = 60.0, 60.0
LOOK_SECONDS, TELL_SECONDS = 0.2, 2.0
MOST_PARTS, LAST_SECONDS = 8, 4.0


def of_gpu(given: Given) -> list[Job]:
    """``tests/gpu``; without a GPU it is collected, and skips itself."""
    return _jobs("tests/gpu", given)


def of_triton(given: Given) -> list[Job]:
    """``tests/triton``, on a CPU in Triton's interpreter."""
    return _jobs("tests/triton", given)


def _jobs(folder: str, given: Given) -> list[Job]:
    return [Job(folder, functools.partial(_run, folder, given), max(0.0, given.until - time.time()))]


def _run(folder: str, given: Given) -> dict[str, Any]:
    if not (ROOT / folder).is_dir():
        return {"absent": f"there is no {folder} beside the package; run it from a checkout"}
    cpus = len(usable_cpus())
    parts = max(1, min(MOST_PARTS, cpus // 2))
    end = given.until - LAST_SECONDS
    name = folder.replace("/", "-")
    running = [Part([folder], f"{place}/{parts}", Path(given.logs) / f"{name}-{place}", cpus // parts)
               for place in range(parts)]  # fmt: skip
    told = time.monotonic()
    try:
        while any([part.look() for part in running]) and time.time() < end:
            time.sleep(LOOK_SECONDS)
            if time.monotonic() > told + TELL_SECONDS:
                told = time.monotonic()
                given.so_far(tally(running))
    finally:
        for part in running:
            part.close()
    found = tally(running)
    if all(part.over for part in running):
        return found
    counts = [part.unbegun() for part in running]
    left = "some" if None in counts else sum(count or 0 for count in counts)
    return found | {"note": f"{left} left", "unfinished": True}


class Part:
    """A pytest process that runs a part of the tests, and again where a test ended it or took too long.

    Parameters
    ----------
    paths : sequence of str
    part : str
        As ``--part`` of the plugin.
    name : Path
        Of its files, without ending.
    threads : int
        Of torch.

    Attributes
    ----------
    over : bool
        Whether all its tests have run.
    """

    def __init__(self, paths: Sequence[str], part: str, name: Path, threads: int = 1, limit: float = TEST_SECONDS):
        self._call = [sys.executable, "-m", "pytest", *paths, "-p", gpu_pytest.__name__, "-p", "no:cacheprovider"]
        self._call += ["--told", str(name.with_suffix(".jsonl")), "--part", part]
        self._told, self._log, self._limit = name.with_suffix(".jsonl"), name.with_suffix(".log"), limit
        self._told.unlink(missing_ok=True)
        self._log.unlink(missing_ok=True)
        self._threads, self.over, self.why = str(max(1, threads)), False, ""
        self._start()

    def _start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": self._threads}
        file: IO[bytes]
        with self._log.open("ab") as file:
            self._process = subprocess.Popen(self._call, cwd=ROOT, stdout=file, stderr=file, env=environment)
        self._before, self._lines, self._since = len(_begun(self.told())), -1, time.monotonic()

    def told(self) -> list[dict[str, Any]]:
        """What its tests have said so far."""
        return gpu_pytest.read_told(self._told)

    def unbegun(self) -> int | None:
        """How many of its tests have not begun; None before it knows them."""
        lines = self.told()
        starts = [place for place, one in enumerate(lines) if "collected" in one]
        return lines[starts[-1]]["collected"] - len(_begun(lines[starts[-1] :])) if starts else None

    def look(self) -> bool:
        """Whether it goes on; a test that takes too long, or has ended the process, is told as failed."""
        if self.over:
            return False
        code, lines = self._process.poll(), self.told()
        if len(lines) != self._lines:
            self._lines, self._since = len(lines), time.monotonic()
        if code is None:
            limit = self._limit if _running(lines) else START_SECONDS
            if time.monotonic() < self._since + limit:
                return True
            self._process.kill()
            self._process.wait()
            return self._again(self.told(), f"ended after {limit:g} s, its time limit")
        # What pytest says of tests that fail, and of none to run.
        if code in (0, 1, 5):
            self.over = True
            return False
        return self._again(self.told(), f"its process ended ({code})")

    def _again(self, lines: list[dict[str, Any]], why: str) -> bool:
        if len(_begun(lines)) == self._before:
            self.over, self.why = True, why  # it does not come to its tests
            return False
        if test := _running(lines):
            with self._told.open("a") as file:
                print(gpu_pytest.line(ended=test, outcome="failed", seconds=0.0, why=why), file=file)
        self._start()
        return True

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _begun(lines: list[dict[str, Any]]) -> list[str]:
    return [one["begun"] for one in lines if "begun" in one]


def _running(lines: list[dict[str, Any]]) -> str | None:
    """The test that has begun last, if it has not ended."""
    begun, ended = _begun(lines), {one["ended"] for one in lines if "ended" in one}
    return begun[-1] if begun and begun[-1] not in ended else None


def tally(parts: Sequence[Part]) -> dict[str, Any]:
    """How many tests passed, which failed and why, and how many are not for this machine."""
    ended = {one["ended"]: one for part in parts for one in part.told() if "ended" in one}
    outcomes = [one["outcome"] for one in ended.values()]
    failures = [f"{name.split('/')[-1]}: {one['why']}" for name, one in ended.items() if one["outcome"] == "failed"]
    found = {"passed": outcomes.count("passed"), "not_for_here": outcomes.count("skipped"), "failures": failures}
    if whys := sorted({part.why for part in parts if part.why}):
        return found | {"failed": f"pytest did not start: {whys[0]}"}
    return found
