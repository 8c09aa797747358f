"""For all tests: where there is no GPU, Triton's kernels run in its interpreter, which must be asked for before import.

``SCOUT_TEST_TRITON`` runs all that is on two tiers through ``TritonScout``: ``reference`` with the kernels' torch
references, ``kernels`` with the kernels themselves, which takes hours in the interpreter. ``SCOUT_TEST_HAND_OVER`` sets
the way of handing over. For looking: tests that plant an error inside the other variant fail then.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

WANTED = os.environ.get("SCOUT_TEST_TRITON")


@pytest.fixture(autouse=bool(WANTED))
def triton_by_default(monkeypatch):
    monkeypatch.setattr("scout_hf.kernels.device._by_default", lambda device: True)
    if WANTED == "reference":
        from tests.triton import reference

        monkeypatch.setattr("scout_hf.kernels.device._load", lambda: reference.KERNELS)
    if way := os.environ.get("SCOUT_TEST_HAND_OVER"):
        from scout_hf.methods import two_tiers_triton as module

        make = module.make_hand_over
        monkeypatch.setattr(module, "make_hand_over", lambda wanted, *args: make(way, *args))
