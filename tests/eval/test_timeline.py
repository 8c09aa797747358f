"""scout-hf trace, through the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from scout_hf.cli import app
from scout_hf.eval.pocket import WEIGHTS

pytest.importorskip("matplotlib")
SMALL = "trace --context 512 --budget 128".split()


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [*SMALL, *arguments])


def test_it_writes_two_files_and_says_what_is_in_them(invoke, tmp_path):
    result = invoke("--steps", "3")
    assert result.exit_code == 0, result.output
    for expected in (
        "scout, LlamaForCausalLM, 512 tokens",
        "3 steps",
        "waiting",
        "the CPU's share",
        "83%",
        "step.json",
    ):
        assert expected in result.stdout  # of 6 layers all but the first are asked for ahead
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.json", "step.png"]
    names = {event["name"] for event in json.loads((tmp_path / "step.json").read_text())["traceEvents"]}
    assert {"step", "layer 5", "ahead 1", "join 0", "attention 5"} <= names


@pytest.mark.parametrize("method", ["dense", "infinigen", "hgca", "kvpr"])
def test_other_methods_over_an_emulated_machine(invoke, tmp_path, method):
    result = invoke("--method", method, "--link-gbps", "2", "--cpu-gbps", "4", "--out", "other.json")
    assert result.exit_code == 0, result.output
    assert f"{method}, Llama" in result.stdout and ("copies" in result.stdout) == (method != "hgca")
    events = json.loads((tmp_path / "other.json").read_text())["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert ("CPU (emulated)" if method == "hgca" else "link (emulated)") in lanes


def test_a_model_from_a_folder(invoke):
    result = invoke("--model", str(WEIGHTS / "qwen3"), "--split", "cpu", "--cpu-query", "real", "--out", "qwen.json")
    assert result.exit_code == 0, result.output
    assert "scout, Qwen3ForCausalLM" in result.stdout


@pytest.mark.parametrize(
    "options, message",
    [
        (["--out", "no/step.json"], "folder that exists"),
        (["--model", "no-such"], "llama, qwen3, or a model's folder"),
        (["--method", "scuot"], "scuot"),
        (["--budget", "3"], "budget=3"),
        (["--device", "gpu"], "--device gpu"),
        (["--model", "."], "cannot be loaded"),
        (["--context", "200000"], "--context 200000"),
        (["--split", "off", "--link-gbps", "1"], "link_gbps=1.0"),
    ],
)
def test_wrong_settings_end_in_a_message(invoke, options, message, tmp_path):
    result = invoke(*options)
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())
