"""``scout-hf fidelity`` from the command line, and the page that its record is shown on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scout_hf import ConfigError
from scout_hf.cli import app
from scout_hf.errors import MissingFileError
from scout_hf.eval.language import command, figures, packaged, report, study
from scout_hf.eval.markdown import begin_mark, between_marks, end_mark, to_markdown
from scout_hf.eval.options import Fidelity
from scout_hf.eval.records import read_record
from scout_hf.eval.text import WEIGHTS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "eval" / "results" / "fidelity.json"
BEGIN, END = begin_mark(report.COMMAND), end_mark(report.COMMAND)
SMALL = ["--model", str(WEIGHTS), "--tokens", "600", "--questions", "1", "--threads", "1", "--digest", "sign"]


def call(*options):
    return CliRunner().invoke(app, ["fidelity", *map(str, options)])


def said(result):
    return " ".join(result.output.split())


def test_a_folder_is_measured_once(tmp_path):
    arms = ["--budget", "64", "--split", "off,cpu", "--set", "block_size=16", "--set", "monitor=0.125"]
    first = call(*SMALL, *arms, "--layers", "--out", tmp_path / "new" / "study")
    assert first.exit_code == 0, first.output
    record = read_record(tmp_path / "new" / "study" / study.RECORD, "fidelity")
    labels = [row.label for row in figures.rows(record)]
    assert labels == ["full attention", "64, sign, block_size=16", "64, sign, two tiers, block_size=16"]
    assert {"commit", "cpu", "torch", "transformers", "scout_hf", "threads"} <= set(record["machine"])
    assert "what sparse decoding loses" in first.output and "by layer" in first.output
    one, two = figures.rows(record)[1:]
    assert one.inside["cpu_ratio"] is None is one.inside["cosine"] and 0.3 < one.inside["mass"] < 1
    assert 0 < two.inside["cpu_ratio"] < 1 and two.inside["cosine"] > 0.3
    names = {study.JOURNAL, study.RECORD, "fidelity.png", "fidelity_layers.png"}
    assert {path.name for path in (tmp_path / "new" / "study").iterdir()} == names
    again = call(*SMALL, *arms, "--out", tmp_path / "new" / "study")
    assert again.exit_code == 0
    assert read_record(tmp_path / "new" / "study" / study.RECORD)["cells"] == record["cells"]
    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}{END}")
    shown = call("--report", tmp_path / "new" / "study" / study.RECORD, "--readme", page)
    assert shown.exit_code == 0 and "by task" in shown.output and "changed" in shown.output
    assert "64, sign, two tiers, block_size=16" in page.read_text() and "| tokens |" in page.read_text()


def test_without_a_model_it_is_the_usual_one_or_one_of_the_package(monkeypatch):
    told = []

    def load(name, ask, tell):
        assert ask("may it?") and name == command.USUAL
        return "model", "tokenizer"

    monkeypatch.setattr(command, "load", load)
    assert command.model_of(Fidelity(yes=True), told.append) == (command.USUAL, "model", "tokenizer")

    def fail(name, ask, tell):
        raise MissingFileError("no network")

    monkeypatch.setattr(command, "load", fail)
    name, model, tokenizer = command.model_of(Fidelity(yes=True), told.append)
    assert name == command.POCKET and model.num_parameters() < 10**7 and tokenizer("def").input_ids
    assert told == ["no network; a pocket model is studied in its place, which promises nothing for a large one"]
    with pytest.raises(MissingFileError):  # one that was named is never another
        command.model_of(Fidelity(model="smollm2-135m", yes=True), told.append)


def test_nobody_to_ask_is_a_no(monkeypatch, tmp_path):
    monkeypatch.setenv("SCOUT_HF_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged, "must_be_readable", lambda name: None)
    told = []
    assert command.model_of(Fidelity(), told.append)[0] == command.POCKET
    assert "nobody to ask: say --yes" in told[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--report", "/nonexistent/fidelity.json"], "/nonexistent/fidelity.json"),
        ([*SMALL, "--budget", "5x"], "--budget 5x is not allowed"),
        (
            [*SMALL, "--digest", "auto,oracle", "--set", "mass=none,0.9"],
            "mass=0.9 is not possible with digest='oracle'",
        ),
        ([*SMALL, "--text", "/nonexistent.txt"], "--text /nonexistent.txt is not there"),
        ([*SMALL, "--tokens", "500000"], "reads 16384 tokens, 500000 and their questions are more"),
        ([*SMALL, "--tokens", "100"], "100 tokens are too few"),
        (["--model", "/nonexistent/model"], "is not the folder of a model"),
        (["--model", "/nonexistent/model.gguf"], "is not there"),
    ],
)
def test_wrong_options_end_in_a_message(options, message, tmp_path):
    result = call(*options, "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in said(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"study": "speed", "cells": []}', '{"study": "fidelity", "model": "m", "cells": [{}]}']
)
def test_something_else_is_no_record(tmp_path, text):
    path = tmp_path / "fidelity.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"fidelity.json"):
        read_record(path, "fidelity")


def test_the_page_of_results_is_up_to_date():
    text = (ROOT / "docs/results/fidelity.md").read_text(encoding="utf-8")
    assert between_marks(text, report.COMMAND)[1].strip() == to_markdown(
        report.parts(json.loads(RESULTS.read_text()))
    ), "again: scout-hf fidelity --report eval/results/fidelity.json --readme docs/results/fidelity.md"
