"""A study that is killed goes on where it was; what was measured for something else is not taken."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

import scout_hf.eval.fidelity.measure as measuring
import scout_hf.eval.fidelity.study as running
from scout_hf.eval.decode_path import answers
from scout_hf.eval.fidelity.cells import MODES, Cell, Effort, weight
from scout_hf.eval.fidelity.measure import measure
from scout_hf.eval.fidelity.report import RESULT
from scout_hf.eval.fidelity.study import adopt, asked_of, run, versions
from scout_hf.eval.fidelity.subjects import available
from scout_hf.eval.records import Journal as AnyJournal


def Journal(path, **options):
    return AnyJournal(path, RESULT, **options)


EFFORT = Effort(questions=4, watched=2)
PREDICTED = "predicted-auto"
CELLS = [Cell("llama", "needle", 512)] + [
    Cell("llama", "needle", 512, mode, 16, 0.25, digest)
    for digest, mode in (("minmax", "real"), ("minmax", PREDICTED), ("oracle", "real"), ("random", "real"))
]
TIMES = ("seconds", "tokens_per_second")

SCRIPT = """
import sys
from pathlib import Path

from tests.eval.test_fidelity_run import CELLS, EFFORT, Journal, available, run

if __name__ == "__main__":
    run(CELLS, EFFORT, available(), Journal(Path(sys.argv[1])), jobs=int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def weights():
    return available()


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory):
    """The results of a run that nobody ended."""
    return run(CELLS, EFFORT, weights, Journal(tmp_path_factory.mktemp("whole") / "cells.jsonl"), jobs=1)


class TestAdopted:
    """A record without its journal, as a repository has it, is gone on with."""

    def record(self, whole, weights):
        machine = {"commit": "before", **versions()}
        settings = {**dataclasses.asdict(EFFORT), "modes": MODES}
        return {
            "study": "fidelity",
            "settings": settings,
            "machine": machine,
            "weights": weights,
            "cells": whole,
        }

    def missing(self, tmp_path, record, weights, effort=EFFORT):
        path = tmp_path / "fidelity.json"
        path.write_text(json.dumps(record))
        journal = Journal(tmp_path / "cells.jsonl", fresh=True, commit="after")
        count = adopt(journal, path, effort, weights)
        asked = [asked_of(cell, effort, weights["llama"]) for cell in CELLS]
        assert count == sum(journal.get(one) is not None for one in asked) == sum(map(journal.foreign, asked))
        return len(CELLS) - count

    def test_only_new_cells_are_measured(self, whole, weights, tmp_path):
        assert self.missing(tmp_path, self.record(whole, weights), weights) == 0
        journal = Journal(tmp_path / "cells.jsonl")
        assert adopt(journal, tmp_path / "fidelity.json", EFFORT, weights) == 0
        method = Cell("llama", "needle", 512, "dense", 16, 0.25)
        found = run([*CELLS, method], EFFORT, weights, journal, jobs=1)
        assert found[:-1] == json.loads(json.dumps(whole)) and found[-1]["right"] == whole[0]["right"]

    def test_what_was_measured_otherwise_is_not_taken(self, whole, weights, tmp_path):
        others = {"machine": {**versions(), "torch": "1.0"}}, {"weights": {"llama": "0" * 12}}
        for change in others:
            assert self.missing(tmp_path, self.record(whole, weights) | change, weights) == len(CELLS)
        record = self.record(whole, weights)
        assert self.missing(tmp_path, record, weights, dataclasses.replace(EFFORT, questions=5)) == len(CELLS)
        record["settings"]["modes"] = MODES | {"real": {"split": "cpu"}}
        assert self.missing(tmp_path, record, weights) == 3
        assert adopt(Journal(tmp_path / "none.jsonl"), tmp_path / "none.json", EFFORT, weights) == 0


def timeless(results):
    return [{name: value for name, value in one.items() if name not in TIMES} for one in results]


def lines(path):
    return path.read_bytes().count(b"\n") if path.is_file() else 0


class TestMeasured:
    def test_what_a_cell_says(self, whole):
        full, real, predicted, oracle, blind = whole
        assert all(set(one["right"]) <= set("01") and len(one["right"]) == EFFORT.questions for one in whole)
        assert full["right"].count("1") >= 3 and oracle["right"] == full["right"] != blind["right"]
        assert full["attended_share"] == 1.0 and 0.2 < real["attended_share"] < 0.4
        assert all(one["tokens_per_second"] > 0 for one in whole)
        assert "cosine" not in real and predicted["cosine"][0] is None and min(predicted["cosine"][1:]) > 0.3
        assert 0 < predicted["cpu_ratio"] < 1 and "cpu_ratio" not in real
        assert all(len(one["mass"]) == len(one["block_recall"]) == 6 for one in whole[1:]) and "mass" not in full
        assert min(oracle["block_recall"]) > max(blind["block_recall"])
        assert set(real["prediction_error"]) == {None} and max(filter(None, predicted["prediction_error"])) > 0

    def test_it_is_the_decode_path_that_is_measured(self, monkeypatch):
        queries = []
        original = torch.nn.functional.scaled_dot_product_attention

        def counted(query, *args, **kwargs):
            queries.append(query.shape[2])
            return original(query, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
        cell = Cell("llama", "needle", 640, "real", 16, 0.25, "minmax")
        result = measure(cell, dataclasses.replace(EFFORT, seed=7))
        # Only prompts go through dense attention, each once, whatever it is read for.
        assert set(queries) == {640} and result["attended_share"] < 0.4

    def test_documents_read_together_or_not(self, monkeypatch):
        several = Effort(questions=20, watched=10)
        cells = [Cell("llama", "trace", 256), Cell("llama", "trace", 256, "real", 16, 0.5, "minmax")]
        together = [measure(cell, several) for cell in cells]
        monkeypatch.setattr(measuring, "READ_TOGETHER", 1)
        alone = [measure(cell, several) for cell in cells]
        assert [one["right"] for one in together] == [one["right"] for one in alone]
        assert 10 < together[0]["right"].count("1") and len(together[0]["right"]) == 20
        assert alone[1]["mass"] == together[1]["mass"]

    def test_only_whole_answers_count(self, monkeypatch):
        def almost(*given):
            found = answers(*given)
            for number, one in enumerate(found.ids):
                one[number % len(one)] += 1
            return found

        assert measure(CELLS[0], EFFORT)["right"].count("1") >= 3
        monkeypatch.setattr(measuring, "answers", almost)
        assert measure(CELLS[0], EFFORT)["right"] == "0" * EFFORT.questions

    def test_another_seed_asks_something_else(self, weights, tmp_path):
        other = dataclasses.replace(EFFORT, seed=1)
        first, second = (measure(CELLS[1], effort) for effort in (EFFORT, other))
        assert first["mass"] != second["mass"]


def is_worker(process):
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return False


class TestKilled:
    def test_a_killed_run_of_two_processes_goes_on_in_one(self, whole, weights, tmp_path, monkeypatch):
        path = tmp_path / "cells.jsonl"
        script = tmp_path / "study.py"
        script.write_text(SCRIPT)
        environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, str(script), str(path), "2"], env=environment)
        try:
            end = time.monotonic() + 120
            while lines(path) < 2:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.005)
            workers = psutil.Process(process.pid).children(recursive=True)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        # Workers do not outlive the run.
        assert not psutil.wait_procs(workers, timeout=20)[1]
        done = lines(path)
        assert 2 <= done < len(CELLS)
        measured = []
        monkeypatch.setattr(running, "measure", lambda cell, effort: measured.append(cell) or measure(cell, effort))
        told = []
        assert timeless(run(CELLS, EFFORT, weights, Journal(path), 1, told.append)) == timeless(whole)
        assert len(measured) == len(CELLS) - done and lines(path) == len(CELLS)
        assert told == [f"{done} of {len(CELLS)} cells are measured already"]

    @pytest.mark.full
    @pytest.mark.parametrize("after", [0, 1], ids=["at its start", "while it measures"])
    def test_ctrl_c_ends_it_at_once_and_in_order(self, tmp_path, after):
        """To the whole group, as a terminal does: workers say nothing, and nobody waits for what they are at."""
        out = tmp_path / "study"
        # A shell's background jobs, and so these tests, may have been told to ignore it.
        heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        run_it = f"{heed}; from scout_hf.cli import app; app()"
        call = [sys.executable, "-c", run_it, "fidelity", "--only", "model=llama"]
        call += ["--only", "task=needle", "--questions", "1", "--jobs", "2", "--out", out]
        process = subprocess.Popen(call, stderr=subprocess.PIPE, start_new_session=True, text=True)
        parent, end, workers = psutil.Process(process.pid), time.monotonic() + 120, []
        while len(workers) < 2 or lines(out / "cells.jsonl") < after:
            assert process.poll() is None and time.monotonic() < end
            workers = [child for child in parent.children(recursive=True) if is_worker(child)]
            time.sleep(0.005)
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)
        told = process.communicate(timeout=20)[1]
        assert process.returncode == 130 and "Traceback" not in told
        assert "stopped; what was measured is in" in told and "goes on from there" in told
        assert not psutil.wait_procs(workers, timeout=20)[1]

    def test_a_line_cut_off_is_measured_again(self, whole, weights, tmp_path):
        path = tmp_path / "cells.jsonl"
        journal = Journal(path)
        asked = [asked_of(cell, EFFORT, weights["llama"]) for cell in CELLS]
        for one, result in zip(asked, whole):
            journal.add(one, result)
        path.write_bytes(path.read_bytes()[:-30])
        journal = Journal(path)
        assert [journal.get(one) is None for one in asked] == [False] * 4 + [True]
        journal.add(asked[-1], whole[-1])
        assert Journal(path).get(asked[-1]) == whole[-1] and lines(path) == len(CELLS)


class TestJournal:
    def test_only_what_was_asked_counts(self, weights, tmp_path):
        journal = Journal(tmp_path / "cells.jsonl")
        asked = asked_of(CELLS[1], EFFORT, weights["llama"])
        journal.add(asked, {"right": "1"})
        others = [
            asked_of(CELLS[2], EFFORT, weights["llama"]),
            asked_of(CELLS[1], dataclasses.replace(EFFORT, questions=5), weights["llama"]),
            asked_of(CELLS[1], dataclasses.replace(EFFORT, seed=1), weights["llama"]),
            asked_of(CELLS[1], EFFORT, "0" * 12),
            {**asked, "config": asked["config"] | {"window": 64}},
            {**asked, "versions": asked["versions"] | {"torch": "2.6.0"}},
        ]
        journal = Journal(tmp_path / "cells.jsonl")
        assert journal.get(asked) == {"right": "1"} and all(journal.get(one) is None for one in others)
        # How long a text is scored does not concern questions.
        assert asked_of(CELLS[1], dataclasses.replace(EFFORT, steps=9), weights["llama"]) == asked

    def test_other_code_is_told_of(self, tmp_path):
        path = tmp_path / "cells.jsonl"
        Journal(path, commit="one").add({"cell": 1}, {})
        assert not Journal(path, commit="one").foreign({"cell": 1})
        assert Journal(path, commit="two").foreign({"cell": 1}) and not Journal(path).foreign({"cell": 2})

    def test_fresh_begins_anew(self, tmp_path):
        path = tmp_path / "cells.jsonl"
        Journal(path).add({"cell": 1}, {})
        assert Journal(path, fresh=True).get({"cell": 1}) is None and not path.exists()

    @pytest.mark.parametrize(
        "text",
        [
            "nonsense\n",
            '{"schema": 1}\n',
            "[]\n",
            '{"schema":1,"asked":{},"result":\n{}\n',
            '{"schema":1,"commit":null,"asked":{},"result":{"right":"012"}}\n',
            '{"schema":1,"commit":null,"asked":{},"result":{"nll":[NaN]}}\n',
            '{"schema":1,"commit":null,"asked":{},"result":{"mass":7}}\n',
            '{"schema":1,"commit":7,"asked":{},"result":{}}\n',
            "[" * 200_000 + "\n",
        ],
    )
    def test_a_foreign_file_is_left_alone(self, tmp_path, text):
        path = tmp_path / "cells.jsonl"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"cells.jsonl, line \d is not a result.*--fresh"):
            Journal(path)
        assert path.read_text() == text


def test_a_figure_that_is_no_number_fails_its_cell_and_leaves_the_journal_readable(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("scout_hf.eval.fidelity.study.measure", lambda cell, effort: {"nll": [float("nan")]})
    path, told = tmp_path / "cells.jsonl", []
    assert run(CELLS[:1], EFFORT, weights, Journal(path), 1, told.append) == [] and "failed" in told[0]
    assert Journal(path).get({}) is None


def test_one_bad_cell_does_not_end_a_study(whole, weights, tmp_path):
    bad = Cell("llama", "needle", 512, "real", 16, 8, "minmax")  # a budget below one block
    told = []
    results = run([bad, CELLS[1]], EFFORT, weights, Journal(tmp_path / "cells.jsonl"), 1, told.append)
    assert timeless(results) == timeless(whole[1:2])
    assert len(told) == 1 and "failed" in told[0] and "budget=8" in told[0]


def test_the_whole_file_is_json(whole, weights, tmp_path):
    run(CELLS[:1], EFFORT, weights, Journal(tmp_path / "cells.jsonl", commit="abc"), jobs=1)
    (entry,) = map(json.loads, (tmp_path / "cells.jsonl").read_text().splitlines())
    assert entry["commit"] == "abc" and entry["asked"]["weights"] == weights["llama"]
    assert set(entry["asked"]["versions"]) == {"scout_hf", "torch", "transformers"}


def test_long_cells_weigh_more():
    long, short = (Cell("llama", "needle", tokens, "real", 32, 0.125, "minmax") for tokens in (8192, 1024))
    assert weight(long) > weight(short) > 0
