"""The command line: what is wrong with an argument is said before anything heavy is imported, and pipes stay clean."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from scout_hf.cli_options import command
from tests.saying import but_for_torchao

HEAVY = ("torch", "transformers", "matplotlib", "lm_eval")
# Runs commands as the shell does, one after the other, and tells of each what was imported by its end.
CODE = """
import contextlib, io, json, sys
commands, heavy, hidden = json.loads(sys.argv[1])
from scout_hf.cli import app
for name in hidden:
    sys.modules[name] = None
told = []
for words in commands:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            app(words, prog_name="scout-hf")
        except SystemExit as end:
            code = end.code
    imported = [name for name in heavy if sys.modules.get(name)]
    told.append((code, out.getvalue(), errors.getvalue(), imported))
print(json.dumps(told))
"""


def call_all(commands, cwd, hidden=()):
    """Exit code, stdout and stderr of each command in one process, and the heavy packages imported by then."""
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    # Whether a user has fetched a real model must not change what runs here.
    environment["SCOUT_HF_CACHE"] = str(cwd)
    given = json.dumps([commands, HEAVY, hidden])
    # Not the checkout, whose folders would be found as packages.
    done = subprocess.run([sys.executable, "-c", CODE, given], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    told = [(code, out, errors, set(heavy)) for code, out, errors, heavy in json.loads(done.stdout)]
    assert not any("Traceback" in errors for _, _, errors, _ in told), told
    return told


def call(*words, cwd):
    return call_all([words], cwd)[0]


HELP = [
    ["--help"],
    *([name, "--help"] for name in ("demo", "fidelity", "serve", "plan", "report", "trace", "version", "bench")),
    *([name, "--help"] for name in ("read", "ask", "batch", "session")),
    *(["session", name, "--help"] for name in ("ls", "info", "rm", "prune")),
]
HELP += [
    ["bench", "methods", "--help"],
    ["bench", "gpu", "--help"],
    ["lm-eval", "--help"],
    ["lm-eval", "make-data", "--help"],
]


@pytest.fixture(scope="module")
def helped(tmp_path_factory):
    return dict(zip(map(" ".join, HELP), call_all(HELP, tmp_path_factory.mktemp("help"))))


@pytest.mark.parametrize("words", list(map(" ".join, HELP)))
def test_help_imports_nothing_heavy(words, helped):
    code, out, _, heavy = helped[words]
    assert code == 0 and "Usage" in out and not heavy


MISSING = {
    "batch of nothing": (["batch", "smollm2-135m", "no.jsonl", "out.jsonl"], "no.jsonl is missing"),
    "report": (["report"], "eval/results is missing"),
    "report of a file": (["report", "no.json"], "no.json is missing"),
    "report of nothing": (["report", "empty"], "no results in empty"),
    "a page in the place of a folder": (["report", "half.json", "--out", "empty"], "empty is a folder"),
    "fidelity": (["fidelity", "--report", "no.json"], "no.json is missing"),
    "readme": (["fidelity", "--report", "half.json", "--readme", "no.md"], "no.md is missing"),
    "plan of no machine": (["plan", "--machine", "no.json"], "no.json is missing"),
    "plan of half a machine": (["plan", "--machine", "half.json"], "half.json cannot be used"),
    "plan of no model": (["plan", "--model", "no/config.json"], "neither known nor a config.json"),
    "plan to check no record": (["plan", "--check", "no.json"], "no.json is missing"),
    "plan on no GPU": (["plan", "--gpu", "h999"], "--gpu h999 is not known"),
    "a file in the place of a folder": (["bench", "cpu-kernel", "--out", "half.json"], "half.json"),
    "trace to no folder": (["trace", "--out", "no/step.json"], "no/step.json"),
    "trace of no model": (["trace", "--model", "no/model"], "--model no/model is not the folder of a model"),
    "methods of no model": (["bench", "methods", "--shape", "./no"], "--shape ./no is not the folder of a model"),
    "no such stage": (["bench", "gpu", "--from", "nowhere", "--out", "results"], "--from nowhere"),
    "no interpreter": (
        ["bench", "methods", "--kvpress-python", "no/python"],
        "--kvpress-python no/python is missing",
    ),
    "data in a file": (["lm-eval", "make-data", "half.json"], "half.json"),
    "trace to another name": (["trace", "--out", "step.txt"], "step.txt"),
}


@dataclass(frozen=True)
class Options:
    """What it is for."""

    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where.")]
    sizes: Annotated[list[int], typer.Option(min=1, help="How large.")] = field(default_factory=lambda: [8, 16])
    name: Annotated[str | None, typer.Option("--name", "-n", help="Who.")] = None
    fast: Annotated[bool, typer.Option("--fast/--slow", help="How.")] = True


def test_a_command_takes_the_fields_of_its_options():
    app, seen = typer.Typer(), []
    command(app, "one", Options)(seen.append)
    command(app, "two", Options)(seen.append)
    call = lambda *words: CliRunner().invoke(app, words, env={"COLUMNS": "120", "NO_COLOR": "1"})  # noqa: E731
    assert call("one", "here").exit_code == 0 and seen == [Options(Path("here"), [8, 16])]
    call("two", "here", "--sizes", "3", "--sizes", "4", "-n", "x", "--slow")
    assert seen[1:] == [Options(Path("here"), [3, 4], "x", False)]
    assert call("one").exit_code == call("one", "here", "--sizes", "0").exit_code == 2 and len(seen) == 2
    text = call("one", "--help").stdout
    assert "What it is for." in text and "How large. [default: 8, 16]" in text and "DIR" in text


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "half.json").write_text('{"benchmark": ')
    found = dict(zip(MISSING, call_all([words for words, _ in MISSING.values()], folder)))
    assert {path.name for path in folder.iterdir()} == {"empty", "half.json"}
    return found


@pytest.mark.parametrize("kind", MISSING)
def test_a_path_that_is_wrong_is_told_at_once(kind, refused):
    code, out, errors, heavy = refused[kind]
    assert code == 2 and MISSING[kind][1] in errors and not out.strip()
    assert errors.startswith("error: ") and errors.count("\n") == 1 and not heavy


def test_a_device_that_is_not_there_takes_torch_alone(tmp_path):
    commands = [["bench", "methods"], ["trace"]]
    for code, out, errors, heavy in call_all([[*words, "--device", "cuda:99"] for words in commands], tmp_path):
        assert code == 2 and not out.strip() and heavy == {"torch"}
        assert errors.startswith("error: --device cuda:99") and errors.count("\n") == 1


def test_a_plan_takes_no_torch(tmp_path):
    code, out, _, heavy = call("plan", "--model", "llama-3-8b", "--context", "131072", cwd=tmp_path)
    assert code == 0 and "kvpr" in out and "dense" in out and not heavy


def test_what_needs_no_model_takes_no_torch(tmp_path):
    version, served, refused = call_all([["--version"], ["families", "--type", "llama"], ["families", "-x"]], tmp_path)
    assert version[0] == 0 and re.fullmatch(r"scout_hf \d+\.\d+\.\d+\n", version[1]) and not version[3]
    assert served[0] == 0 and "1 type: 1 named" in served[1] and not served[3]
    assert refused[0] == 2 and not refused[3]


def test_what_is_kept_is_listed_without_torch(tmp_path):
    (tmp_path / "kept" / "one.kv").mkdir(parents=True)
    (tmp_path / "kept" / "one.kv" / "session.json").write_text("{}")
    (tmp_path / "store").mkdir(mode=0o700)
    listed, empty, pruned = call_all(
        [["session", "ls", "kept"], ["session", "ls", "--store", "store"], ["session", "prune", "--store", "store"]],
        tmp_path,
    )
    assert listed[0] == 0 and "damaged" in listed[1] and "kept/one.kv: " in listed[1] and not listed[3]
    assert empty[0] == 0 and "nothing is kept in" in empty[1] and not empty[3]
    assert pruned[0] == 0 and "0 bytes freed" in pruned[1] and not pruned[3]


def test_the_benchmark_to_start_with_is_the_first(helped):
    text = helped["bench --help"][1]
    assert "Start with cpu-decode." in text
    assert text.index("│ cpu-decode") < text.index("│ cpu-kernel") < text.index("│ sessions") < text.index("│ gpu")


def test_help_of_lm_eval_helps_without_lm_eval(tmp_path):
    commands = [["run", "--help"], ["run", "-h"], ["run", "--tasks", "x"]]
    *helped, refused = call_all([["lm-eval", *words] for words in commands], tmp_path, hidden=("lm_eval",))
    for code, out, _, heavy in helped:
        assert code == 0 and "--longbench-dir" in out and "pip install 'scout_hf[eval]'" in out and not heavy
    code, out, errors, heavy = refused
    assert code == 2 and "pip install 'scout_hf[eval]'" in errors and not heavy


SERVER = "transformers.cli.serving"


@pytest.mark.parametrize("hidden", [[SERVER], ["uvicorn", "openai"]], ids=["server", "packages"])
def test_without_what_the_server_needs_nothing_is_loaded(hidden, tmp_path):
    code, out, errors, heavy = call_all([["serve", "smollm2-135m"]], tmp_path, hidden)[0]
    there = importlib.util.find_spec(SERVER) is not None and hidden != [SERVER]
    expected = "needs .*openai.*uvicorn: pip install 'scout_hf.serve.'" if there else "has no server that takes"
    assert code == 2 and not out and re.search(expected, errors)
    assert errors.startswith("error: ") and errors.count("\n") == 1 and not (there and "torch" in heavy)


def test_version_is_plain_words(tmp_path):
    code, out, errors, _ = call("version", cwd=tmp_path)
    lines = {line[:13].strip(): line[14:] for line in out.strip().splitlines()}
    assert code == 0 and list(lines)[:4] == ["scout_hf", "transformers", "torch", "python"]
    assert lines["GPU"].startswith(("yes, ", "no")) and lines["native code"].startswith(("yes, for ", "no, "))
    assert len(lines) < 10 and max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("words", [["lm-eval", "make-data", "data", "--rows", "1", "--tokens", "256"], ["plan"]])
def test_a_reader_that_ends_early_is_no_error(words, tmp_path):
    """As in ``scout-hf plan | head -1``."""
    code = f"from scout_hf.cli import app; app({words!r}, prog_name='scout-hf')"
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
    finally:
        os.close(write)
    assert done.returncode == 1 and but_for_torchao(done.stderr) == ""


def test_no_progress_bar_in_a_pipe(tmp_path):
    small = ["--tokens", "256", "--questions", "1", "--budget", "64"]
    code, out, errors, _ = call("demo", "--pocket", *small, cwd=tmp_path)
    assert code == 0 and "right" in out
    assert "\r" not in errors and "%|" not in errors and "it/s" not in errors, errors


def test_every_bar_asks_whether_it_is_seen():
    import ast
    from pathlib import Path

    for path in sorted((Path(__file__).parents[2] / "eval").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "tqdm":
                assert "disable" in {word.arg for word in node.keywords}, f"{path}:{node.lineno}"
