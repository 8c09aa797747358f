"""The comparison of methods: every kind of cell once, going on, wrong input, the tables and the page."""

from __future__ import annotations

import json
import re

import pytest

from scout_hf.eval.methods import run as runs
from scout_hf.eval.methods import tables, view, ways
from scout_hf.eval.methods.emulate import emulation_of
from scout_hf.eval.report.page import write
from scout_hf.methods import method_names

SMALL = {
    "contexts": (512,), "batches": (1,), "layers": 1, "mha_contexts": (256,), "equal_context": 512, "budget": 128,
    "tasks": ("needle",), "score_context": 512, "budget_shares": (0.25,), "questions": 4, "seconds": 0.02,
    "link_gbps": 0.5, "cpu_gbps": 2.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("results") / "methods.json"


@pytest.fixture(scope="module")
def record(path):
    return runs.run(**SMALL, path=path)


def test_every_method_has_a_row():
    assert set(method_names()) <= {name.split(",")[0] for name in ways.names()}


def test_all_cells_have_a_figure_or_a_reason(record):
    cells = record["cells"]
    assert {one["way"] for one in cells} == set(ways.names())
    for one in cells:
        assert ("step_ms" in one and one["step_ms"] > 0) or ("row_step_ms" in one) or one["missing"] or one["oom"]
    reasons = {one["way"]: one["missing"] for one in cells if "missing" in one}
    assert reasons["stock offloaded"] == "needs a GPU"
    by_way = {one["way"]: one for one in view.measured(view.at(record, view.Place("gqa", 512, 1)))}
    assert {way for way, one in by_way.items() if one["exact"]} == {"stock", "kvpr", "dense"}
    assert by_way["dense"]["link_bytes"] > by_way["infinigen"]["link_bytes"] > 0 == by_way["hgca"]["link_bytes"]
    assert by_way["scout"]["device_bytes"] < by_way["stock"]["device_bytes"]
    assert "no smaller" in by_way["kvpr"]["notes"][0]
    equal = [one for one in cells if one["part"] == "equal" and "step_ms" in one]
    cap = by_way["stock"]["device_bytes"]
    assert {one["way"] for one in equal} == set(by_way)
    assert all(one["device_bytes"] <= 1.3 * cap or one["batch"] == 1 for one in equal)
    scores = {one["way"]: one for one in view.scores(record)}
    assert scores["dense"]["right"] == scores["stock"]["right"] == 4


def test_a_run_that_was_ended_goes_on(record, path, monkeypatch):
    assert json.loads(path.read_text()) == record
    path_of_half = path.with_name("half.json")
    half = record | {"cells": record["cells"][::2]}
    path_of_half.write_text(json.dumps(half))
    told = []
    again = runs.run(**SMALL, path=path_of_half, tell=told.append)
    assert len(told) == len(record["cells"]) - len(half["cells"])
    assert {str(sorted(one)) for one in again["cells"]} == {str(sorted(one)) for one in record["cells"]}
    monkeypatch.setattr(runs.speed, "measure", None)
    runs.run(**SMALL, path=path_of_half)
    with pytest.raises(ValueError, match="layers=1.*--fresh"):
        runs.run(**SMALL | {"layers": 2}, path=path_of_half)


def test_wrong_input_says_what_there_is():
    with pytest.raises(ValueError, match="scout, no recall"):
        runs.run(**SMALL | {"chosen": ["scuot"]})
    with pytest.raises(ValueError, match="llama"):
        runs.run(**SMALL | {"model": "no-such"})
    with pytest.raises(ValueError, match="paper"):
        emulation_of("no-such", None, None, 32)
    emulation, why = emulation_of("paper", None, None, 32)
    assert emulation.cpu_gbps / emulation.link_gbps == pytest.approx(100 / 15, rel=0.02) and "20 times" in why


def test_tables_name_every_way(record):
    from rich.console import Console

    console = Console(record=True, width=160, file=open("/dev/null", "w"))
    for part in tables.tables(record):
        console.print(part)
    text, page = console.export_text(), "\n".join(tables.lines(record))
    for name in ways.names():
        assert name in text
    assert "link at 0.5 GB/s" in text and "link at 0.5 GB/s" in page
    assert "Not measured: stock offloaded: needs a GPU" in page and "Tokens per second" in page


def test_one_page_without_references(record, path, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "page" / "report.html"
    assert write([path.parent / "methods.json"], out) == [str(path)]
    page = out.read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page.replace("http-equiv", "")
    assert page.count("<img") == 6 and "<td>infinigen</td>" in page and "link at 0.5 GB/s" in page
    assert [each.name for each in out.parent.iterdir()] == ["report.html"]
    with pytest.raises(ValueError, match="methods.json"):
        write([tmp_path / "nothing"], out)
