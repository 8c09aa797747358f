"""The other end of :mod:`scout_hf.eval.bench.rivals_apart`: a process of its own, which may end any time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from scout_hf.eval.arms import Missing
from scout_hf.eval.bench import rivals_apart

LIMIT_SECONDS = 3600.0
ENDING_SECONDS = 20.0
TEAMS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
PIP = {"llama.cpp": "llama-cpp-python", "openvino": "openvino-genai"}
_WIDEST = 300


class RivalError(Exception):
    """A rival that cannot go on; the text is its result."""


class Rival:
    """A runtime of ``rivals_apart.KINDS``, behind pipes.

    Missing if its package is not installed there, RivalError if it ends, fails or does not answer in time: it is of no
    more use then. Use it as a context, or call :meth:`close`.
    """

    def __init__(self, kind: str, python: str, threads: int, limit: float = LIMIT_SECONDS):
        self.kind, self._limit = kind, limit
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the process
        self._process = subprocess.Popen(
            [python, rivals_apart.__file__, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=os.environ | dict.fromkeys(TEAMS, str(threads)),
        )
        self._watched = psutil.Process(self._process.pid)
        try:
            said = self._answer()
            if "absent" in said:
                raise Missing(f"not installed: pip install {PIP[kind]} ({said['absent']})"[:_WIDEST])
            self.versions: dict[str, str] = said["versions"]
            self.fills: bool = said["fills"]
            self._before = self._watched.memory_info().rss
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Rival:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ask(self, do: str, **given: Any) -> dict[str, Any]:
        """The answer to a request; RivalError if it is none."""
        with suppress(OSError):  # it has ended, which the answer shows
            self._process.stdin.write(json.dumps({"do": do} | given) + "\n")
            self._process.stdin.flush()
        said = self._answer()
        if "failed" in said:
            raise RivalError(" ".join(said["failed"].split())[:_WIDEST])
        return said

    def log(self) -> str:
        """What it wrote to stderr, and to stdout beside its answers."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def cpu_seconds(self) -> float:
        """CPU time of all its threads so far; 0 once it has ended."""
        with suppress(psutil.Error):
            times = self._watched.cpu_times()
            return times.user + times.system
        return 0.0

    def grown_bytes(self) -> dict[str, int]:
        """By how much it is larger than before it opened a model, and was at most where the system says."""
        if self._process.poll() is not None:
            raise RivalError(self._end())
        try:
            held = self._watched.memory_info().rss
            status = Path(f"/proc/{self._process.pid}/status")
            found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
        except (psutil.Error, OSError) as error:
            raise RivalError(self._end()) from error
        most = max(held, int(found[1]) * 1024 if found else held)
        return {"held_bytes": held - self._before, "peak_bytes": most - self._before}

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        late: list[bool] = []

        def kill() -> None:
            late.append(True)
            self._process.kill()

        timer = threading.Timer(self._limit, kill)
        timer.daemon = True
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        try:
            said = json.loads(line)
        except ValueError as error:
            why = self._end()
            if late:
                why = f"it did not answer within {self._limit:g} s"
            raise RivalError(why) from error
        return said

    def _end(self) -> str:
        """Why there is no answer."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING_SECONDS)
        lines = [line for line in self.log().splitlines() if line.strip()]
        last = f": {lines[-1].strip()}" if lines else ""
        return f"its process ended ({self._process.returncode}){last}"[:_WIDEST]
