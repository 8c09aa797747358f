"""For all tests: where there is no GPU, Triton's kernels run in its interpreter, which must be asked for before import.

``SCOUT_TEST_TRITON`` runs all that is on two tiers through ``TritonExecutor``: ``reference`` with the kernels' torch
references, ``kernels`` with the kernels themselves, which takes hours in the interpreter. ``SCOUT_TEST_HAND_OVER`` sets
the way of handing over. For looking: tests that plant an error inside the other variant fail then.

Of a grid marked ``thin(n)`` every n-th diagonal runs, see ``cells.py``, of what is marked ``full`` nothing: ``--full``
runs all of it, ``--full-only`` the rest.
"""

import gc
import os

import pytest
import torch

from tests.cells import run_by_default
from tests.interpreter import patched_once_a_launch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run what is marked full too, and thinned grids whole")
    parser.addoption("--full-only", action="store_true", help="run only what is left out without --full")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    wanted = run_by_default(items)
    if config.getoption("--full-only"):
        wanted = {item.nodeid for item in items} - wanted
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
    items[:] = [item for item in items if item.nodeid in wanted]


def keep_for_good():
    """What is imported by now lasts as long as the process: no later collection looks through it."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish(session):
    keep_for_good()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    result = yield
    if nextitem is not None and nextitem.path != item.path:
        keep_for_good()
    return result


def pytest_unconfigure(config):
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def a_faster_interpreter():
    with patched_once_a_launch():
        yield


@pytest.fixture(scope="session")
def pocket():
    """The packaged pocket model and its tokenizer, float32, unpatched."""
    from scout_hf.eval.pocket import load_pocket

    return load_pocket()


@pytest.fixture(scope="session")
def pocket64():
    """The same in float64, where rounding is far below any tolerance."""
    from scout_hf.eval.pocket import load_pocket

    return load_pocket(dtype=torch.float64)


@pytest.fixture
def emulated(monkeypatch):
    """The clock of emulated links and CPUs: it moves only while somebody waits for them."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    monkeypatch.setattr("scout_hf.stores.emulated_link.time", clock := Clock())
    return clock


@pytest.fixture
def monitored_at_once(monkeypatch):
    """The monitor's native thread has an ordinary priority: at the lowest, it waits for all that the machine runs."""
    from scout_hf.kernels.cpu.pool import NativePool, spare_workers

    monkeypatch.setattr(NativePool, "_free_cores", lambda self: spare_workers(1 if self.background else self.threads))


WANTED = os.environ.get("SCOUT_TEST_TRITON")


@pytest.fixture(autouse=bool(WANTED))
def triton_by_default(monkeypatch):
    monkeypatch.setattr("scout_hf.kernels.device._by_default", lambda device: True)
    if WANTED == "reference":
        from tests.triton import reference

        monkeypatch.setattr("scout_hf.kernels.device._load", lambda: reference.KERNELS)
    if way := os.environ.get("SCOUT_TEST_HAND_OVER"):
        from scout_hf.methods.scout import executor_triton as module

        make = module.make_handoff
        monkeypatch.setattr(module, "make_handoff", lambda wanted, *args: make(way, *args))
