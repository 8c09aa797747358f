"""A stage of ``bench gpu`` in a process group of its own: its messages, and its end when it takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scout_hf
from scout_hf.eval.bench.gpu_stages import HERE

_WIDEST = 200


class Watched:
    """A stage that runs.

    Parameters
    ----------
    jobs : str
        As in :class:`Stage`.
    given : dict
        Fields of :class:`Given`, and ``done``: jobs that are not to run.
    log : Path
        Gets, at its end, all that the process writes.

    Attributes
    ----------
    running : str or None
        The job that runs.
    """

    def __init__(self, jobs: str, given: dict[str, Any], log: Path):
        self.running: str | None = None
        self._limit, self._begun = float("inf"), time.monotonic()
        self._log, self._from = log, log.stat().st_size if log.exists() else 0
        self._read, write = os.pipe()
        # Where the package lies may be known to this process alone.
        paths = [str(Path(scout_hf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{HERE}.gpu_apart", jobs, str(write), json.dumps(given)],
                # It ends itself when this pipe closes: when the process that watches it is gone.
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                start_new_session=True,
                env=environment,
            )
        os.close(write)

    def follow(self, seconds: float, hear: Callable[[dict[str, Any]], Any], patience: float) -> str | None:
        """Pass its messages on until it ends; why it did not end by itself, or None.

        ``patience`` is in seconds: a process that has pinned much memory takes its time to die, and the next one would
        find too little.
        """
        end, held = time.monotonic() + seconds, b""
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._read, selectors.EVENT_READ)
                while True:
                    now = time.monotonic()
                    if now >= end:
                        return f"ended after {round(seconds, 1):g} s, its time limit"
                    if now >= self._begun + self._limit:
                        return f"{self.running} ended after {round(self._limit, 1):g} s, its time limit"
                    if not selector.select(min(end, self._begun + self._limit) - now):
                        continue
                    part = os.read(self._read, 1 << 16)
                    if not part:
                        return self._ended(patience)
                    *lines, held = (held + part).split(b"\n")
                    for line in lines:
                        self._hear(json.loads(line), hear)
        finally:
            self._close(patience)

    def _hear(self, message: dict[str, Any], hear: Callable[[dict[str, Any]], Any]) -> None:
        if "begin" in message:
            self.running, self._limit, self._begun = message["begin"], message["limit"], time.monotonic()
        elif "end" in message:
            self.running, self._limit = None, float("inf")
        hear(message)

    def _ended(self, patience: float) -> str | None:
        try:
            code = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            return "its process did not end"
        if code == 0:
            return None
        how = f"crashed ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
        text = self._log.read_bytes()[self._from :].decode(errors="replace")
        last = [line.strip() for line in text.splitlines() if line.strip()][-1:]
        # Python ends with 1 after an error, whose message is the last line.
        told = last[0] if code == 1 and last else ": ".join([how, *last])
        return "".join(char if char.isprintable() else " " for char in told)[:_WIDEST]

    def _close(self, patience: float) -> None:
        # What it started too, as processes of tests.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it; the group is gone later
            self._process.wait(patience)
        os.close(self._read)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
