"""The demo and the other commands, through the command line."""

import dataclasses
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import scout_hf
from scout_hf.cli import app
from scout_hf.eval import decode_path

SMALL = "demo --tokens 512 --questions 3 --budget 128".split()


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return lambda arguments: CliRunner().invoke(app, arguments)


def test_demo_shows_answers_and_costs(invoke):
    result = invoke(SMALL)
    assert result.exit_code == 0, result.output
    for expected in ("512 tokens", "stock", "exact", "sparse", "2 tiers", "tok/s", "host", "digests"):
        assert expected in result.stdout
    assert "all answers equal to stock" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_demo_fails_if_exact_differs_from_stock(invoke, monkeypatch):
    right = decode_path.answer

    def wrong_when_patched(model, tokenizer, cache, *rest):
        given = right(model, tokenizer, cache, *rest)
        return dataclasses.replace(given, text="nothing") if isinstance(cache, scout_hf.ScoutCache) else given

    monkeypatch.setattr(decode_path, "answer", wrong_when_patched)
    result = invoke(SMALL)
    assert result.exit_code == 1, result.output
    assert "3 of 3 answers differ" in result.stdout


@pytest.mark.parametrize(
    "options, message",
    [(["--budget", "3"], "budget=3"), (["--block-size", "7"], "block_size=7"), (["--questions", "300"], "facts")],
)
def test_wrong_settings_end_in_a_message(invoke, options, message):
    result = invoke([*SMALL, *options])
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output


def test_version_names_what_a_bug_report_needs(invoke):
    result = invoke(["version"])
    assert result.exit_code == 0
    for expected in (scout_hf.__version__, "torch", "transformers", "native code", "GPU"):
        assert expected in result.stdout


def test_the_command_line_starts_without_torch():
    code = "import sys, scout_hf.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
