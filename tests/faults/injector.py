"""An error at any line of chosen files, once, each in a process of its own.

``sys.settrace`` tells of every line before it runs, so an error raised there is one that surfaced between two lines:
Ctrl-C is seen after a call or at a function's entry, a failed allocation inside of a line. A forked child inherits the
state that was prepared, and whatever becomes of it ends with the child.
"""

from __future__ import annotations

import linecache
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).parents[2] / "scout_hf"
ROOMS = (
    "stores/",
    "methods/",
    "selection/",
    "sessions/",
    "prefix/",
    "token_log.py",
    "padding.py",
    "cache",
    "step.py",
    "graph",
    "files.py",
)
"""Beginnings of paths."""
CHILD_SECONDS = 20.0


class Point(NamedTuple):
    """The ``number``-th line that was run, which is the ``time``-th time that this line was."""

    number: int
    file: str
    line: int
    time: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line} (time {self.time})"


class Tracer:
    """Calls ``seen(number, file, line)`` before every line in the rooms that the calling thread runs.

    Left out is a line that only ends a ``with`` block: no call comes between the block and its end, so nothing surfaces
    there, and a lock would stay taken. ``opcodes`` tells of every bytecode instruction instead.
    """

    def __init__(self, seen: Callable[[int, str, int], None], rooms: Iterable[str] = ROOMS, opcodes: bool = False):
        self.seen, self.opcodes, self.number = seen, opcodes, -1
        self.rooms = tuple(str(PACKAGE / room) for room in rooms)
        self.files: dict[str, str | None] = {}

    def __enter__(self) -> Tracer:
        sys.settrace(self.call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def call(self, frame, event: str, arg: Any):
        path = frame.f_code.co_filename
        if path not in self.files:
            self.files[path] = os.path.relpath(path, PACKAGE) if path.startswith(self.rooms) else None
        if self.files[path] is None:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = self.opcodes, not self.opcodes
        last, ends_block = 0, False

        def line(frame, event: str, arg: Any):
            nonlocal last, ends_block
            if event in ("line", "opcode"):
                here = frame.f_lineno
                if here != last:
                    ends_block = last > here and linecache.getline(path, here).lstrip().startswith("with ")
                    last = here
                if not ends_block:
                    self.number += 1
                    self.seen(self.number, self.files[path], here)
            return line

        return line


def record(operation: Callable[[], Any], **options: Any) -> list[Point]:
    """Every point of an operation."""
    found: list[Point] = []
    times: Counter = Counter()

    def seen(number: int, file: str, line: int) -> None:
        times[file, line] += 1
        found.append(Point(number, file, line, times[file, line]))

    with Tracer(seen, **options):
        operation()
    return found


def inject(operation: Callable[[], Any], number: int, error: type[BaseException], **options: Any) -> bool:
    """Run an operation with an error at a point; whether the error came out of it."""

    def seen(here: int, file: str, line: int) -> None:
        if here == number:
            raise error("planted")

    try:
        with Tracer(seen, **options):
            operation()
    except error:
        return True
    return False


class Outcome(NamedTuple):
    """What a child said, and how it ended where it said nothing."""

    value: Any
    fault: str | None


def in_child(job: Callable[[], Any], seconds: float = CHILD_SECONDS) -> Outcome:
    """What ``job`` returns in a forked child, which is ended after that many seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            answer = Outcome(job(), None)
        except BaseException:
            answer = Outcome(None, traceback.format_exc())
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said, until = b"", time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                break
            said += part
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(None, f"hangs: no answer within {seconds:g} s")
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return Outcome(None, f"crash: {signal.Signals(os.WTERMSIG(status)).name}")
    return pickle.loads(said)
