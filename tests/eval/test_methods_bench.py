"""The comparison of methods: every kind of cell once, going on, wrong input, the tables and the page."""

from __future__ import annotations

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

import scout_hf
from scout_hf import diagnostics
from scout_hf.cli import app
from scout_hf.diagnostics import shares
from scout_hf.eval import arms, caches
from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench import drift, models
from scout_hf.eval.markdown import to_markdown
from scout_hf.eval.methods import run as runs
from scout_hf.eval.methods import score, tables, view
from scout_hf.eval.methods.options import Methods
from scout_hf.eval.methods.speed import emulation_of
from scout_hf.methods import base, method_names
from scout_hf.selection import digest

SMALL = {
    "contexts": (512,), "batches": (1,), "layers": 1, "mha_contexts": (256,), "equal_context": 512, "budget": 128,
    "tasks": ("needle",), "score_context": 512, "budget_shares": (0.25,), "questions": 4, "seconds": 0.02,
    "link_gbps": 0.5, "cpu_gbps": 2.0, "memory_gib": (0.0004, 0.002),
}  # fmt: skip


GRID = [field.name for field in dataclasses.fields(runs.Grid)]


def compare(command=None, tell=lambda line: None, **given):
    """A run of options, and of a grid in which none of them changes anything."""
    grid = runs.Grid(**{name: value for name, value in given.items() if name in GRID})
    options = Methods(**{name: value for name, value in given.items() if name not in GRID})
    return runs.run(options, grid, command, tell)


@pytest.fixture(scope="module", autouse=True)
def apart():
    """No digest or method left behind: other tests go through all there are."""
    with pytest.MonkeyPatch.context() as patch:
        for registry in (digest._DIGESTS, base._METHODS):
            patch.setattr(registry, "_classes", dict(registry._classes))
        # Heads and hidden states as they are, by which KVPR decides; nothing here depends on the MLP.
        patch.setattr(models, "SHAPE", models.SHAPE | {"intermediate_size": 64})
        # Looking through all of this process for garbage after each cell takes longer than the cell.
        patch.setattr(devices, "release", lambda device: None)
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("results") / "methods.json"


@pytest.fixture(scope="module")
def record(path):
    return compare(**SMALL, out=path.parent)


def test_every_method_has_a_row():
    assert set(method_names()) - {drift.NAME} <= {name.split(",")[0] for name in arms.names()}


def test_all_cells_have_a_figure_or_a_reason(record):
    cells = record["cells"]
    assert {one["way"] for one in cells} == set(arms.names())
    for one in cells:
        assert ("step_ms" in one and one["step_ms"] > 0) or ("row_step_ms" in one) or one.get("missing") or one["oom"]
    reasons = {one["way"]: one["missing"] for one in cells if "missing" in one}
    assert reasons["stock offloaded"] == "needs a GPU"
    by_way = {one["way"]: one for one in view.measured(view.at(record, view.Place("gqa", 512, 1)))}
    assert {way for way, one in by_way.items() if one["exact"]} == {"stock", "stock folded", "kvpr", "dense"}
    assert by_way["dense"]["link_bytes"] > by_way["infinigen"]["link_bytes"] > 0 == by_way["hgca"]["link_bytes"]
    assert 0 < by_way["infinigen, kept"]["link_bytes"] < 0.2 * by_way["infinigen"]["link_bytes"]
    assert by_way["scout"]["device_bytes"] < by_way["stock"]["device_bytes"]
    assert "no smaller" in by_way["kvpr"]["notes"][0]
    equal = [one for one in cells if one["part"] == "equal" and "step_ms" in one and "gib" not in one]
    cap = by_way["stock"]["device_bytes"]
    too_much = {one["way"] for one in cells if one["part"] == "equal" and "gib" not in one and "oom" in one}
    assert {one["way"] for one in equal} | too_much == set(by_way) and {"stock", "scout"} <= set(by_way) - too_much
    assert all(one["device_bytes"] <= 1.3 * cap for one in equal)
    for one in cells:
        if one["part"] in ("speed", "equal") and "step_ms" in one:
            assert one["tokens_per_s"] == pytest.approx(1e3 * one["batch"] / one["step_ms"])
            assert one["q1_ms"] <= one["median_ms"] <= one["q3_ms"]
    scores = {one["way"]: one for one in view.scores(record)}
    assert scores["dense"]["right"] == scores["stock"]["right"] == 4


def test_a_run_that_was_ended_continues(record, path, monkeypatch):
    assert json.loads(path.read_text()) == record
    (half_of_it := path.parent / "half").mkdir()
    half = record | {"cells": record["cells"][::2]}
    (half_of_it / "methods.json").write_text(json.dumps(half))
    told = []

    def known(part):
        """What the first run found, in place of measuring it once more."""

        def measure(cell, *_):
            named = ("part", "way", "task") if part == "score" else ("part", "way", "context", "batch", "gib")
            same = [one for one in record["cells"] if all(one.get(name) == cell.get(name) for name in named)]
            return next(one for one in same if (one["part"] == "score") == (part == "score"))

        return measure

    monkeypatch.setattr(runs.speed, "measure", known("speed"))
    monkeypatch.setattr(runs.score, "measure", known("score"))
    again = compare(**SMALL, out=half_of_it, tell=told.append, command="as typed")
    # What was not installed is tried again.
    missing = [one for one in half["cells"] if "missing" in one]
    assert missing and len(told) == len(record["cells"]) - len(half["cells"]) + len(missing)
    assert {str(sorted(one)) for one in again["cells"]} == {str(sorted(one)) for one in record["cells"]}
    assert again["commands"] == ["as typed"]
    told.clear()
    monkeypatch.setattr(runs.speed, "measure", lambda *_: pytest.fail("measured again"))
    compare(**SMALL | {"way": ["scout", "stock", "dense"]}, out=half_of_it, tell=told.append)
    assert not told
    with pytest.raises(ValueError, match="layers=1.*--fresh"):
        compare(**SMALL | {"layers": 2}, out=half_of_it)


def test_wrong_input_says_what_there_is():
    for wrong, message in ({"budget": 0}, "budget=0"), ({"link_gbps": 0.0}, "link_gbps=0.0"):
        with pytest.raises(scout_hf.ConfigError, match=message):
            compare(**SMALL | wrong)
    with pytest.raises(ValueError, match="sets both rates"):
        compare(**SMALL | {"emulate": "paper"})
    with pytest.raises(ValueError, match="scout, predicted, no recall"):
        compare(**SMALL | {"way": ["scuot"]})
    with pytest.raises(ValueError, match="llama"):
        compare(**SMALL | {"model": "no-such"})
    with pytest.raises(ValueError, match="paper"):
        emulation_of("no-such", None, None, 32)
    emulation, why = emulation_of("paper", None, None, 32)
    assert emulation.cpu_gbps / emulation.link_gbps == pytest.approx(100 / 15, rel=0.02) and "20 times" in why


def test_tables_name_every_way(record):
    from rich.console import Console

    console = Console(record=True, width=160, file=open("/dev/null", "w"))
    for part in tables.tables(record):
        console.print(part)
    text, page = console.export_text(), to_markdown(tables.parts(record))
    for name in arms.names():
        assert name in text
    assert "link at 0.5 GB/s" in text and "link at 0.5 GB/s" in page
    assert "Not measured: stock offloaded: needs a GPU" in page and "Tokens per second" in page


# -- what may go wrong -------------------------------------------------------------------------------------------------

ONE = SMALL | {"mha_contexts": (), "equal_context": None, "memory_gib": (), "tasks": (), "way": ["dense", "scout"]}


def test_an_error_is_a_result_and_tried_again(tmp_path, monkeypatch):
    measure, told = runs.speed.measure, []

    def fail(cell, *given):
        if cell["way"] == "dense":
            raise RuntimeError("no luck\nat all")
        if cell["way"] == "scout":
            raise MemoryError("too much")
        return measure(cell, *given)

    monkeypatch.setattr(runs.speed, "measure", fail)
    found = compare(**ONE, out=tmp_path, tell=told.append)["cells"]
    by_way = {one["way"]: one for one in found}
    assert by_way["dense"]["failed"] == "RuntimeError: no luck" and by_way["scout"]["oom"] == "MemoryError: too much"
    assert view.reason(by_way["dense"]).startswith("failed") and view.reason(by_way["scout"]).startswith(
        "out of memory"
    )
    assert "failed: RuntimeError: no luck" in told
    monkeypatch.setattr(runs.speed, "measure", measure)
    found = compare(**ONE, out=tmp_path)["cells"]
    assert len(found) == 2 and "step_ms" in found[1] and found[1]["way"] == "dense" and "oom" in found[0]


def test_other_code_is_told_and_other_files_are_refused(tmp_path):
    path, told = tmp_path / "methods.json", []
    compare(**ONE, out=tmp_path)
    record = json.loads(path.read_text())
    record["cells"][0]["commit"] = "another"
    path.write_text(json.dumps(record))
    compare(**ONE, out=tmp_path, tell=told.append)
    assert told == ["1 cells were measured with other code; --fresh measures everything again"]
    with pytest.raises(ValueError, match="shape=None.*--fresh"):
        compare(**ONE | {"shape": "mha"}, out=tmp_path)
    record["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="torch='1.0'"):
        compare(**ONE, out=tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="benchmark, settings.*--fresh"):
        compare(**ONE, out=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shape": "no-such"}, "gqa, mha, llama-3-8b"),
        ({"device": "tpu"}, "--device tpu"),
        ({"tasks": ("needel",)}, "needle"),
        ({"contexts": (100,)}, "--contexts 100"),
        ({"batches": (0,)}, "numbers above 0"),
        ({"block_size": 31}, "block_size"),
    ],
)
def test_wrong_settings_say_what_is_allowed(wrong, message):
    with pytest.raises(ValueError, match=message):
        compare(**ONE | wrong)


def test_names_from_options():
    assert arms.parse(["stock,scout, neither", "dense,stock"]) == ("stock", "scout, neither", "dense")
    assert arms.parse([]) is None
    with pytest.raises(ValueError, match="arm 'scuot' is not known.*hgca"):
        arms.parse(["stock,scuot"])


def test_the_command_writes_and_refuses(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(runs, "QUICK", runs.Grid(**{name: ONE[name] for name in GRID if name in ONE}))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    call = ["bench", "methods", "--quick", "--methods", "scout,dense", "--budget", "128", "--link-gbps", "0.5"]
    result = CliRunner().invoke(app, [*call, "--cpu-gbps", "2", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert {one["way"] for one in json.loads((tmp_path / "methods.json").read_text())["cells"]} == {"scout", "dense"}
    assert "link at 0.5 GB/s" in result.stdout
    result = CliRunner().invoke(app, ["bench", "methods", "--methods", "scuot"])
    assert result.exit_code == 2 and "arm 'scuot' is not known" in result.stderr


# -- parts -------------------------------------------------------------------------------------------------------------


def test_rows_of_equal_memory(record):
    equal = {key: view.measured(cells) for key, cells in view.equal(record).items()}
    assert {gib for _, gib in equal} == {None, 0.0004, 0.002}
    rows = {gib: {one["way"]: one["batch"] for one in cells} for (_, gib), cells in equal.items()}
    assert rows[0.002]["hgca"] > rows[0.002]["stock"] >= 1 and rows[None]["stock"] == 1
    none = [one for one in record["cells"] if one.get("gib") == 0.0004 and one["way"] == "stock"]
    assert none[0]["batch"] == 0 and "more than 0.0004 GiB" in none[0]["oom"]
    for (_, gib), cells in equal.items():
        for one in cells:
            assert gib is None or one["batch"] == runs.MOST_ROWS or one["device_bytes"] <= 1.2 * gib * runs.GIB


def test_a_step_is_taken_apart(record, monkeypatch):
    cells = {one["way"]: one["shares"] for one in view.measured(view.at(record, view.Place("gqa", 512, 1)))}
    for found in cells.values():
        assert set(found) == set(diagnostics.PARTS) and sum(found.values()) == pytest.approx(1.0, abs=0.02)
        assert all(share >= 0 for share in found.values()) and found["attention"] > 0
    assert cells["scout"]["selection"] > 0 and cells["infinigen"]["selection"] > 0 == cells["dense"]["selection"]
    assert cells["dense"]["wait"] > 0 and cells["stock"]["wait"] == 0
    # Nothing is left of the clock: what is registered afterwards is what models use.
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", print)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is print


def test_a_clock_counts_every_moment_once(monkeypatch):
    now = iter(range(0, 100, 10))
    monkeypatch.setattr(shares.time, "perf_counter", lambda: next(now))
    clock = shares.Clock()
    inner = clock.around("inner", lambda: None)
    clock.around("outer", lambda: (inner(), inner()))()
    assert clock.spent == {"inner": 20, "outer": 30}


def test_bytes_of_tensors_that_are_made_of_others():
    whole = torch.zeros(8, dtype=torch.bfloat16)
    packed = SimpleNamespace()
    assert caches.tensor_bytes([whole, (whole, {"scale": whole}), packed, None]) == 48


def test_kvpress_is_asked_in_another_process(tmp_path):
    with pytest.raises(arms.Missing, match="not installed"):
        score.kvpress(tmp_path, [(torch.tensor([[1, 2]]), [[3]], [[4]])], 0.5, str(tmp_path / "no-such-python"))
    fake = tmp_path / "python"
    found = {"ids": [[4, 5], [4, 6]], "prefill_s": 1.0, "seconds": 2.0, "steps": 4, "kept": 1, "device_bytes": 8}
    answer = json.dumps(found | {"versions": {"kvpress": "0"}})
    fake.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[3], 'w').write({answer!r})\n")
    fake.chmod(0o755)
    got = score.kvpress(tmp_path, [(torch.tensor([[1, 2]]), [[3], [3]], [[4, 5], [4, 5]])], 0.5, str(fake))
    assert (got["right"], got["questions"], got["row_step_ms"], got["exact"]) == (1, 2, 500.0, False)
    fake.write_text(f"#!{sys.executable}\nraise SystemExit('out of luck')\n")
    with pytest.raises(RuntimeError, match="out of luck"):
        score.kvpress(tmp_path, [(torch.tensor([[1, 2]]), [[3]], [[4]])], 0.5, str(fake))


def test_scores_are_those_of_what_is_timed():
    def score(way, right):
        where = {"part": "score", "way": way, "task": "needle", "context": 4096, "budget": 512, "right": right}
        return where | {"questions": 10, "row_step_ms": 1.0, "prefill_s": 1.0, "exact": False}

    record = {"cells": [score("scout", 9), score("scout, predicted", 7), score("infinigen", 8)]}
    found = [view.score_of(record, way) for way in ("scout", "scout, predicted", "infinigen, kept", "hgca")]
    assert found == ["90 %", "70 %", "80 %", "–"]
    assert not view.predicted(record)
    speeds = [{"part": "speed", "way": way, "step_ms": 1.0} for way in ("scout", "scout, predicted")]
    assert "the paper's rule" in view.predicted({"cells": speeds})


def test_slower_is_said():
    assert view.faster(2.0) == "2.00 times faster" and view.faster(0.5) == "2.00 times slower"


def test_what_is_said_of_the_paper():
    def record(**speed):
        cells = [{"part": "speed", "way": way, "shape": "gqa", "context": 32768, "batch": 4} for way in speed]
        speeds = [{"tokens_per_s": value, "step_ms": 4e3 / value} for value in speed.values()]
        return {"settings": {}, "cells": [one | two for one, two in zip(cells, speeds)]}

    scout = "scout, predicted"
    told = list(tables.sentences(record(**{scout: 8}, hgca=4, **{"infinigen, kept": 2}, stock=1)))
    assert len(told) == 1
    assert "scout, predicted 8.00; hgca 4.00; infinigen, kept 2.00: the order of" in told[0]
    told = list(tables.sentences(record(**{scout: 1}, hgca=4, **{"infinigen, kept": 2}, stock=8)))
    assert "not the order (scout" in told[0] and "Stock, 8.00, holds all KV" in told[1]
    found = record(**{scout: 6, f"{scout}, no recall": 4, "scout, neither": 2})
    assert "ahead makes it 2.00 times faster, recall another 1.50" in next(tables.sentences(found))
    found = record(**{scout: 3, f"{scout}, no recall": 4, "scout, neither": 2})
    assert "recall another 1.33 times slower" in next(tables.sentences(found))
    assert not list(tables.sentences(record(scout=1)))


def test_the_fastest_stock_counts(record):
    cells = view.at(record, view.Place("gqa", 512, 1))
    times = {one["way"]: one["step_ms"] for one in view.measured(cells)}
    assert view.best_stock(cells) == min(times["stock"], times["stock folded"]) and view.best_stock([]) is None


def test_a_model_of_ones_own(tmp_path):
    from scout_hf.eval.pocket import WEIGHTS

    folder = str(WEIGHTS / "qwen3")
    found = compare(**ONE | {"shape": folder, "way": ["scout", "stock"]})
    assert [one["shape"] for one in found["cells"]] == [folder] * 2 and all("step_ms" in one for one in found["cells"])
    assert "qwen3, 4 query and 2 KV heads" in view.shape_name(found, folder)
    text = to_markdown(tables.parts(found))
    assert "qwen3, 4 query" in text and "random weights" not in text
