"""A plugin of pytest: every n-th test, each told in a line of JSON when it begins and when it ends.

A process that is started again leaves out what has begun before; one whose GPU is broken ends, since all that follows
would fail too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

BROKEN = ("CUDA error", "device-side assert", "unspecified launch failure")


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--told", help="file that gets the lines")
    parser.addoption("--part", help="1/4: every fourth test, from the second one on")


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(_Teller(Path(config.getoption("--told")), config.getoption("--part")))


def read_told(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def line(**said: Any) -> str:
    """A line of such a file."""
    return json.dumps(said)


class _Teller:
    def __init__(self, path: Path, part: str):
        self.begun = {one["begun"] for one in read_told(path) if "begun" in one}
        self.file = path.open("a", buffering=1)
        self.place, self.parts = map(int, part.split("/"))

    def tell(self, **said: Any) -> None:
        self.file.write(f"{line(**said)}\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items[self.place :: self.parts] if item.nodeid not in self.begun]
        self.tell(collected=len(items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tell(begun=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            text = "" if report.passed else report.longreprtext
            self.tell(ended=report.nodeid, outcome=report.outcome, seconds=report.duration, why=_last(text))
            if report.failed and any(word in text for word in BROKEN):
                os._exit(3)


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("E ")] or text.splitlines()[-1:]
    return lines[0][1:].strip()[:200] if lines else ""
