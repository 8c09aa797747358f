"""For all tests: where there is no GPU, Triton's kernels run in its interpreter, which must be asked for before import.

``SCOUT_TEST_TRITON`` runs all that is on two tiers through ``TritonExecutor``: ``reference`` with the kernels' torch
references, ``kernels`` with the kernels themselves, which takes hours in the interpreter. ``SCOUT_TEST_HAND_OVER`` sets
the way of handing over. For looking: tests that plant an error inside the other variant fail then.

A grid marked ``thin(n)`` runs on every n-th diagonal: each value of each axis meets every n-th value of each other one,
and all values where a third axis is at least n long. ``--full`` runs every cell.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run every cell of the grids that are thinned by default")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    left_out = [item for item in items if not _is_kept(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _is_kept(item)]


def _is_kept(item) -> bool:
    mark = item.get_closest_marker("thin")
    if mark is None:
        return True
    places = dict(item.callspec.indices)
    for axis in item.iter_markers("parametrize"):
        names = axis.args[0]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        for other in names[1:]:  # several names on one axis have one place
            places.pop(other)
    return sum(places.values()) % mark.args[0] == 0


@pytest.fixture
def emulated(monkeypatch):
    """The clock of emulated links and CPUs: it moves only while somebody waits for them."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    monkeypatch.setattr("scout_hf.stores.emulated.time", clock := Clock())
    return clock


@pytest.fixture
def monitored_at_once(monkeypatch):
    """The monitor's native thread has an ordinary priority: at the lowest, it waits for all that the machine runs."""
    from scout_hf.kernels.cpu.pool import NativePool, spare_workers

    monkeypatch.setattr(NativePool, "_room", lambda self: spare_workers(1 if self.background else self.threads))


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
