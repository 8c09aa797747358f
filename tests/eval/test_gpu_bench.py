"""``bench gpu``: stages that fail in every way, and, at toy sizes and on a CPU, what its stages measure."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from scout_hf.cli import app
from scout_hf.errors import ConfigError
from scout_hf.eval.bench import gpu, gpu_report
from scout_hf.eval.bench.gpu_stages import STAGES, Stage
from scout_hf.eval.bench.gpu_tests import Part, tally
from scout_hf.eval.bench.options import Gpu
from scout_hf.eval.records import read_record

HERE = "tests.eval.gpu_planted"
ROOT = Path(__file__).parents[2]


def stage(name, jobs, most=20.0, least=0.1, needs=(), on_cpu=True):
    return Stage(name, "planted", f"{HERE}:{jobs}", most, least, needs, on_cpu)


def run(folder, stages, begin=None, seconds=30, **options):
    return gpu.run(Gpu(seconds, folder, begin, "cpu", **options), stages=stages)


def states(record):
    return {one["stage"]: one["state"] for one in record["stages"]}


def cells(record, name):
    return {one["cell"]: one for one in record["cells"] if one["stage"] == name}


def printed(record):
    sink = io.StringIO()
    gpu.show(record, Console(file=sink, width=gpu_report.WIDTH))
    lines = sink.getvalue().splitlines()
    assert len(lines) <= gpu_report.MOST_LINES and max(map(len, lines)) <= gpu_report.WIDTH
    return " ".join(sink.getvalue().split())


BROKEN = (
    stage("machine", "fine"),
    stage("smoke", "crash"),
    stage("tests", "hang", most=1.0),
    stage("triton", "nothing"),
    stage("kernels", "one_hangs"),
    stage("short", "fine", needs=("smoke",)),
    stage("long", "fine", needs=("short",)),
    stage("wide", "fine", least=1e6),
    stage("offloaded", "fine", on_cpu=False),
)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    return folder, run(folder, BROKEN)


def test_the_table_is_whole_whatever_fails(broken):
    folder, record = broken
    whole = {"machine": "done", "smoke": "failed", "tests": "in part", "triton": "failed", "kernels": "in part"}
    assert states(record) == whole | dict.fromkeys(("short", "long", "wide", "offloaded"), "not run")
    assert read_record(folder / "gpu.json", "gpu") == json.loads(json.dumps(record))
    text = printed(record)
    for told in (
        "crashed (exit code 11)", "tests in part, 1 s: ended after 1 s, its time limit; not measured: waits",
        "ImportError: there is no such library", "not run short, long: smoke failed",
        "not run wide: no time left: it takes 1000000 s", "not run offloaded: needs a GPU",
    ):  # fmt: skip
        assert told in text, told
    assert (folder / "gpu.txt").read_text().split() == text.split()
    # What was written to the log is there to be read.
    assert "no such library" in (folder / "logs" / "triton.log").read_text()


def test_what_follows_a_job_that_hangs_runs_in_a_new_process(broken):
    found = cells(broken[1], "kernels")
    assert found["hangs"]["failed"] == "hangs ended after 0.3 s, its time limit"
    assert found["maker"]["facts"] == ["1"] and found["before"]["gb_per_s"] == found["after"]["gb_per_s"] == 4
    assert found["no memory"]["oom"] == "RuntimeError: CUDA error: out of memory"
    assert found["needs memory"]["skipped"] == "not run: no memory failed"
    assert cells(broken[1], "tests")["ends"]["gb_per_s"] == 4


def test_a_later_run_goes_on_from_a_stage(tmp_path, monkeypatch):
    first = run(tmp_path, BROKEN[:5])
    before = cells(first, "tests")["ends"]
    mended = [stage("machine", "crash"), stage("smoke", "fine"), *BROKEN[2:4], stage("kernels", "fine"), BROKEN[5]]
    again = run(tmp_path, mended, "smoke")
    assert states(again) | {"tests": ""} == {
        "machine": "done", "smoke": "done", "tests": "", "triton": "failed", "kernels": "done", "short": "done",
    }  # fmt: skip
    # It begins nowhere again: not before that stage, nor what the same code has measured.
    assert cells(again, "tests")["ends"] == before and "first" in cells(again, "machine")
    assert cells(again, "smoke")["second"]["known"] == ["kernels", "machine", "tests"]
    assert "failed" not in cells(again, "kernels")
    monkeypatch.setattr(gpu, "_code", lambda: "other")
    other = run(tmp_path, BROKEN[:4], "tests")
    assert cells(other, "tests")["ends"]["code"] == "other"
    # Without --from all begins anew, and nothing is lost.
    run(tmp_path, BROKEN[:1])
    assert len(list(tmp_path.glob("gpu-*.json"))) == 1


def test_what_had_no_time_comes_last_in_a_run_that_goes_on(tmp_path):
    def stages(least):
        return [
            stage("machine", "fine"), stage("smoke", "crash"), stage("tests", "cut"),
            stage("triton", "fine", least=least), stage("short", "fine"),
        ]  # fmt: skip

    first = run(tmp_path, stages(1e6)[:4])
    assert states(first) == {"machine": "done", "smoke": "failed", "tests": "in part", "triton": "not run"}
    text = printed(first)
    assert "3 passed, 0 failed, 0 skipped; 3 left" in text and "in part, 0 s: out of time, 3 left" in text
    still = run(tmp_path, stages(1e6), "short")
    assert states(still) == states(first) | {"tests": "done", "short": "done"}
    second = run(tmp_path, stages(0.1), "short")
    # What failed before is not tried again, and what was measured is kept.
    assert states(second) == states(still) | {"triton": "done"} and cells(second, "tests")["tests"]["passed"] == 6
    ran = {one["stage"]: one["run"] for one in second["cells"]}
    assert ran["machine"] == cells(first, "machine")["first"]["run"]


def test_a_rehearsal_leaves_to_the_end_what_takes_long(tmp_path):
    stages = [stage("triton", "fine")._replace(late_on_cpu=True), stage("short", "fine")]
    assert list(states(run(tmp_path, stages))) == ["short", "triton"]
    assert [one.name for one in STAGES if one.late_on_cpu] == ["triton"]


def test_without_a_gpu_one_line_says_what_was_not_run(tmp_path):
    record = gpu.run(Gpu(60, tmp_path, None, "cuda:77"), stages=(stage("machine", "crash"), *STAGES[1:]))
    text = printed(record)
    assert text.count("not run") == 1
    assert "not run smoke, tests, triton, kernels, short, long, wide, offloaded: machine failed" in text


def test_a_run_goes_on_only_from_what_it_can_rely_on(tmp_path):
    stages = [stage("machine", "fine"), stage("smoke", "fine", needs=("machine",))]
    with pytest.raises(ValueError, match="--from nowhere: allowed are machine, smoke"):
        run(tmp_path, stages, "nowhere")
    with pytest.raises(ValueError, match="smoke needs machine.*try --from machine"):
        run(tmp_path, stages, "smoke")
    run(tmp_path, stages)
    with pytest.raises(ValueError, match="seed=0.*another --out"):
        run(tmp_path, stages, "smoke", seed=1)
    path = tmp_path / "gpu.json"
    record = json.loads(path.read_text())
    for name, wrong in (("format", "scout_hf.gpu/9"), ("stages", [{"stage": "smoke"}]), ("cells", [{"cell": 3}])):
        path.write_text(json.dumps(record | {name: wrong}))
        with pytest.raises(ConfigError, match=name):
            run(tmp_path, stages, "smoke")


def test_tests_that_are_ended_keep_what_is_known(tmp_path):
    record = run(tmp_path, [stage("tests", "tells")])
    found = cells(record, "tests")["tests"]
    assert found["passed"] == 3 and found["failed"] == "tests ended after 0.5 s, its time limit"
    assert "3 passed, 0 failed, 0 skipped; failed" in printed(record)


KILLED = """
import sys
from pathlib import Path
from scout_hf.eval.bench import gpu
from scout_hf.eval.bench.gpu_stages import Stage
from scout_hf.eval.bench.options import Gpu
stages = [Stage("machine", "planted", "tests.eval.gpu_planted:hang", 60, 1)]
gpu.run(Gpu(60, Path(sys.argv[1]), None, "cpu"), stages=stages)
"""


def test_whoever_is_killed_leaves_results_and_no_process(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    path, until = tmp_path / "gpu.json", time.monotonic() + 60
    while not (path.exists() and '"ends"' in path.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(children) == 1 and not psutil.wait_procs(children, timeout=30)[1]
    assert cells(read_record(path, "gpu"), "machine")["ends"]["gb_per_s"] == 4


PLANTED_TESTS = """
import os, time, pytest
def test_passes(): pass
def test_fails(): assert 1 == 2, "one is not two"
def test_ends_the_process(): os._exit(7)
def test_hangs(): time.sleep(600)
@pytest.mark.skip(reason="needs more")
def test_is_not_for_here(): pass
def test_breaks_the_gpu(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_comes_last(): pass
"""


def test_a_test_that_hangs_or_crashes_takes_no_other_with_it(tmp_path):
    (tmp_path / "test_planted.py").write_text(PLANTED_TESTS)
    parts = [Part([str(tmp_path)], f"{place}/2", tmp_path / f"part{place}", limit=1.0) for place in range(2)]
    try:
        while any([part.look() for part in parts]):
            time.sleep(0.02)
    finally:
        for part in parts:
            part.close()
    found = tally(parts)
    assert found["passed"] == 2 and found["not_for_here"] == 1 and "failed" not in found
    assert sorted(one.split("::")[1] for one in found["failures"]) == [
        "test_breaks_the_gpu: RuntimeError: CUDA error: an illegal memory access was encountered",
        "test_ends_the_process: its process ended (7)",
        "test_fails: AssertionError: one is not two",
        "test_hangs: ended after 1 s, its time limit",
    ]


def test_tests_without_time_are_counted(tmp_path):
    (tmp_path / "test_planted.py").write_text(PLANTED_TESTS)
    part = Part([str(tmp_path)], "0/1", tmp_path / "part")
    known = part.unbegun()
    while len([one for one in part.told() if "begun" in one]) < 4:
        part.look()
        time.sleep(0.02)
    part.close()
    # It ran three tests, one of which ended its process, and hangs in the fourth of seven.
    assert known is None and part.unbegun() == 3


def test_tests_that_do_not_start_say_so(tmp_path):
    part = Part([str(tmp_path / "gone.py")], "0/1", tmp_path / "part")
    while part.look():
        time.sleep(0.02)
    assert "pytest did not start" in tally([part])["failed"]


# -- the real stages ------------------------------------------------------------------------------------------------


def test_a_rehearsal_with_a_crash_and_a_hang(tmp_path):
    """The command's own stages on a CPU, but for two."""
    real = {one.name: one for one in STAGES}
    stages = (real["machine"], real["smoke"], stage("tests", "crash"), stage("triton", "hang", most=1.0))
    stages += (real["kernels"], real["short"])
    record = run(tmp_path, stages, layers=1, seconds=240)
    text = printed(record)
    assert list(states(record).values()) == ["done", "done", "failed", "in part", "not run", "done"], text
    assert "REHEARSAL" in text and "CUT to 1 layers" in text and "not run kernels: needs a GPU" in text
    found = cells(record, "short")
    for name in ("join", "stock", "full KV, sdpa"):
        assert found[name]["median_ms"] > 0 and found[name]["batch"] == 8 and name in text
    assert found["join"]["host_kv_bytes"] > 0 and found["join"]["facts"] == ["Scout (torch)"]
    assert found["graph, real"]["skipped"] == found["full KV, triton"]["skipped"] == "needs a GPU"
    assert cells(record, "smoke")["join"]["difference"] < 0.05
    assert record["machine"]["torch"] and json.loads((tmp_path / "gpu.json").read_text()) == record


def test_the_command_says_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "STAGES", BROKEN[:2])
    monkeypatch.setattr(gpu.run, "__defaults__", (*gpu.run.__defaults__[:1], BROKEN[:2], *gpu.run.__defaults__[2:]))
    words = ["bench", "gpu", "--device", "cpu", "--seconds", "20", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and "crashed (exit code 11)" in done.output
    refused = CliRunner().invoke(app, [*words, "--from", "nowhere"])
    assert refused.exit_code == 2 and "--from nowhere" in refused.output


# -- the table ------------------------------------------------------------------------------------------------------

LONGEST = "RuntimeError: " + "a very long reason " * 12
TIMES = {
    "plain": {"us": 1890.0, "share_of_copy": 0.77},
    "prefetch lines": {"us": 1850.0, "share_of_copy": 0.79},
    "sdpa flash": {"us": 2200.0},
    "flashinfer": {"absent": "not installed"},
}


def full_record(bad):
    """All that a GPU can give, or every cell with the longest of reasons."""

    def cell(stage, name, **found):
        common = {"stage": stage, "cell": name, "run": "now", "code": "0", "seconds": 1.0}
        return common | (found if not bad or name == "model" else {"failed": f"{name}: {LONGEST}"})

    arms = ("graph, predicted", "graph, real", "full KV, triton", "full KV, sdpa", "stock", "flags", "join")
    arms += ("graph, not fused",)
    step = {"median_ms": 123.4, "q1_ms": 123.1, "q3_ms": 125.9, "tokens_per_s": 130.2, "device_kv_bytes": 6.87e10}
    step |= {"cpu_ratio": 0.08, "join_wait_ms": 12.3}
    found = [cell("machine", "versions", facts=["16 CPUs", "avx512bf16", "119.4 of 125.8 GiB free"])]
    found += [cell("machine", name, gb_per_s=4321.0) for names in gpu_report.RATES.values() for name in names]
    found += [cell("machine", "matrix product, bf16", tflop_per_s=790.0)]
    found += [
        cell("smoke", name, difference=0.01, facts=["Scout (triton, Flags)"]) for name in ("join", "flags", "graph")
    ]
    found += [
        cell(name, f"tests/{name}", passed=900, not_for_here=9, failures=[LONGEST]) for name in ("tests", "triton")
    ]
    found += [cell("kernels", f"all of 8 x {place}", times=TIMES) for place in range(8)]
    for name, rows, context in (("short", 8, 8192), ("long", 8, 65536), ("wide", 16, 32768)):
        found += [cell(name, "model", facts=["llama-3-8b"]), cell(name, "cache", facts=[])]
        found += [cell(name, arm, batch=rows, context=context, warnings=[LONGEST], **step) for arm in arms]
    found += [cell("offloaded", "stock offloaded", batch=8, context=32768, **step)]
    state, why = ("in part", LONGEST) if bad else ("done", None)
    stages = [{"stage": one.name, "state": state, "why": why, "left": ["x"] * bad, "seconds": 99.0} for one in STAGES]
    settings = {"device": "cuda", "layers": None, "budget": 2048, "digest": "minmax", "drift": 0.1, "seed": 0}
    return {
        "benchmark": "gpu", "format": "scout_hf.gpu/1", "settings": settings, "stages": stages, "cells": found,
        "machine": {"gpu": "NVIDIA H200", "torch": "2.11.0+cu130", "transformers": "5.17.0"},
    }  # fmt: skip


@pytest.mark.parametrize("bad", [False, True])
def test_the_table_fits_where_all_went_well_and_where_all_failed(bad, tmp_path):
    record = full_record(bad)
    (tmp_path / "gpu.json").write_text(json.dumps(record))
    text = printed(read_record(tmp_path / "gpu.json"))
    assert all(one.name in text for one in STAGES) and ("…" not in text)
    if not bad:
        assert "1850 us, 79% of copying; flash 2200, f.infer -" in text and "790 TFLOP/s" in text
        assert "8 x 64k graph, predicted 123 123-126 1.00 130 68.7 8% 12.3" in text


def test_the_page_of_results_shows_it(tmp_path):
    from scout_hf.eval.report.page import write

    (tmp_path / "gpu.json").write_text(json.dumps(full_record(False)))
    write([tmp_path], tmp_path / "page.html")
    assert "graph, predicted" in (tmp_path / "page.html").read_text()
