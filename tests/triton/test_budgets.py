"""What exceeds a budget of compiled kernels is told; that the kernels are within theirs is ``make test-compiled``."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.triton.artefacts import Artefact  # noqa: E402
from tests.triton.budgets import excesses  # noqa: E402

TWO = {(64, 128): 2}
GOOD = {
    "attend residents": Artefact(96, 0, 72192, ["LDGSTS.E.BYPASS.128", "HMMA.16816.F32.BF16", "STG.E"], TWO),
    "copy": Artefact(30, 0, 0, ["LDG.E", "LDG.E.128", "STG.E.128"], {}),
    "post": Artefact(32, 0, 0, ["LDG.E.128", "STG.E.128", "MEMBAR.SC.SYS", "ST.E.64.STRONG.SYS"], {}),
    "plan": Artefact(28, 0, 16, ["LDG.E", "LDG.E", "BAR.SYNC", "LDG.E", "BAR.SYNC", "STG.E"], {}),
    "choose": Artefact(70, 0, 1024, ["LDG.E", "ISETP.GE.AND", *["ISETP.GE.AND.EX"] * 4, "ATOMS.POPC.INC.32"], {}),
    "wait": Artefact(10, 0, 0, ["LDG.E.64", "LD.E.64.STRONG.SYS"], {}),
}
PLANTED = {
    "registers": ("attend residents", {"registers": 129}),
    "stack": ("copy", {"stack": 8}),
    "local store": ("copy", {"opcodes": ["LDG.E.128", "STL.64", "STG.E.128"]}),
    "one buffer": ("attend residents", {"buffers": {(64, 128): 1}}),
    "narrow loads": ("attend residents", {"opcodes": ["LDGSTS.E.64", "HMMA.16816.F32.BF16"]}),
    "narrow stores": ("copy", {"opcodes": ["LDG.E.128", "STG.E.64"]}),
    "no fence": ("post", {"opcodes": ["LDG.E.128", "STG.E.128", "ST.E.64.STRONG.SYS"]}),
    "a flag before its data": ("post", {"opcodes": ["LDG.E.128", "MEMBAR.SC.SYS", "ST.E.64.STRONG.SYS", "STG.E.128"]}),
    "two fences": ("post", {"opcodes": ["LDG.E.128", "STG.E.128", *["MEMBAR.SC.SYS"] * 2, "ST.E.64.STRONG.SYS"]}),
    "loads behind stores": ("copy", {"opcodes": ["LDG.E.128", "STG.E.128"] * 2}),
    "counts after sums": ("plan", {"opcodes": ["LDG.E", "BAR.SYNC", "LDG.E", "BAR.SYNC", "LDG.E", "STG.E"]}),
    "wide compares": ("choose", {"opcodes": ["LDG.E", *["ISETP.GE.AND.EX"] * 5, "ATOMS.POPC.INC.32"]}),
    "a read that orders nothing": ("wait", {"opcodes": ["LD.E.64"]}),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_within_its_budget_is_silent(name):
    assert not list(excesses(name, GOOD[name]))


@pytest.mark.parametrize("what", PLANTED)
def test_what_exceeds_its_budget_is_told(what):
    name, changed = PLANTED[what]
    assert len(list(excesses(name, GOOD[name]._replace(**changed)))) == 1
