"""An error at every line of the rooms that keep state: the cache goes on as before, or refuses; see ``sweep``."""

import json
import linecache
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.faults.injector import PACKAGE, Tracer, in_child, inject, record

ROOT = Path(__file__).parents[2]
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
THIN = ("one tier, budget", "two tiers, ahead", "two tiers, graph", "infinigen, kept", "hgca, lossy")
THIN_SCENARIOS = ("decode a full block", "next turn", "crop", "reorder")
OLD_TRUNCATE = """
def truncate(self, blocks):
    if blocks < self.blocks:
        self.pool.release(self.ids[:, blocks:])
        self.blocks = blocks
        self._last_is_ours = False
"""


def run(*arguments: str, before: str = "") -> tuple[int, dict, str]:
    """Exit status, figures and all that a sweep prints, in a process that has no threads of other tests."""
    code = f"import sys; from tests.faults import sweep\n{before}\nsys.exit(sweep.main())"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    assert lines, done.stderr
    return done.returncode, json.loads(lines[-1]), done.stdout


@FORKS
def test_a_few_points_of_each_kind():
    where = ("--settings", ";".join(THIN), "--scenarios", ";".join(THIN_SCENARIOS))
    status, figures, text = run(*where, "--keep", "43")
    assert status == 0, text
    assert figures["tried"] > 80 and figures["continued"] > 60 and figures["refused"] > 5


@FORKS
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_line(capsys):
    jobs, keep = os.environ.get("SCOUT_TEST_JOBS", "2"), os.environ.get("SCOUT_TEST_KEEP", "1")
    status, figures, text = run("--jobs", jobs, "--keep", keep)
    with capsys.disabled():
        print(f"\n{figures}")
    assert status == 0, text


@FORKS
def test_the_sweep_sees_a_page_that_is_given_back_twice():
    before = f"from scout_hf.stores import page_table\n{OLD_TRUNCATE}\npage_table.PageTable.truncate = truncate"
    # The wrong lines are compiled under the name that the sweep looks at.
    before = before.replace(OLD_TRUNCATE, f"exec(compile({OLD_TRUNCATE!r}, page_table.__file__, 'exec'))")
    where = ("--settings", "one tier", "--scenarios", "crop", "--errors", "interrupt", "--jobs", "1")
    status, figures, text = run(*where, "--rooms", "stores/page_table.py", before=before)
    assert status == 1 and figures["faults"] and "the fork is wrong" in text


@FORKS
@pytest.mark.parametrize(
    ("job", "seconds", "wrong"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 60, "crash: SIGKILL"),
        (lambda: time.sleep(600), 0.5, "hangs"),
        (lambda: 1 / 0, 60, "ZeroDivisionError"),
    ],
)
def test_children_that_end_badly(job, seconds, wrong):
    assert wrong in in_child(job, seconds).fault
    assert in_child(lambda: "well").value == "well"


EXAMPLE = """
def work(lock):
    with lock:
        first = 1
    for number in range(2):
        first += number
    return first
"""


def test_points_are_all_lines_but_ends_of_with_blocks():
    found, name = {}, str(PACKAGE / "stores" / "example.py")
    linecache.cache[name] = (len(EXAMPLE), None, EXAMPLE.splitlines(keepends=True), name)
    exec(compile(EXAMPLE, name, "exec"), found)
    lock = threading.Lock()
    points = record(lambda: found["work"](lock))
    assert [point.line for point in points] == [3, 4, 5, 6, 5, 6, 5, 7]
    assert [point.time for point in points if point.line == 5] == [1, 2, 3]
    for point in points:
        assert inject(lambda: found["work"](lock), point.number, KeyboardInterrupt) and not lock.locked()
    assert not inject(lambda: found["work"](lock), len(points), KeyboardInterrupt)
    with Tracer(lambda *_: pytest.fail("not in the rooms"), rooms=("methods/",)):
        found["work"](lock)
