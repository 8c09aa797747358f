"""What no module may do, since one place does it right: files, JSON that is read back, and what runs foreign code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    path for capacity in ("scout_hf", "patches", "eval", "examples") for path in (ROOT / capacity).rglob("*.py")
)

# What is called, and the places that may: each with its reason.
FORBIDDEN = {
    ".write_text": {
        "eval/bench/gpu_apart.py",  # a switch in /proc
        "examples/batch_ray.py",  # prompts, as a user writes them
        "eval/bench/memory.py",  # another
        "eval/harness/longbench.py",  # in a folder that was just made, for this process alone
        "eval/methods/kvpress_apart.py",  # has no scout_hf, and writes into such a folder
        "eval/methods/score.py",  # into the same
        "scout_hf/sessions/folder.py",  # into a folder that gets its name when it is whole
    },
    ".write_bytes": {"scout_hf/sessions/folder.py"},  # into the same
    "os.replace": {"scout_hf/files.py"},
    ".replace": set(),
    ".rename": set(),
    "json.loads": {
        "scout_hf/files.py",
        "examples/batch_ray.py",  # what it was answered
        "scout_hf/batch/settings.py",  # what it has just written, as plain data
        "scout_hf/diagnostics/gpu_time.py",  # what torch's profiler has just written for us
        "eval/bench/gpu_apart.py",  # what we asked
        "eval/bench/gpu_process.py",  # what a process of our own has just said, and was asked
        "eval/bench/gpu_pytest.py",  # the same, line by line
        "eval/bench/memory.py",  # what a process of our own has just said, and was asked
        "eval/methods/kvpress_apart.py",  # what we asked
        "eval/bench/rivals_apart.py",  # the same
        "eval/bench/rivals_process.py",  # what a process of our own has just said, and was asked
    },
    "json.load": set(),
    ".mktemp": set(),
    "torch.load": set(),
    "pickle.load": set(),
    "pickle.loads": {"scout_hf/batch/ray_workers.py"},  # what Ray carries between processes of our own, never a file
    "yaml.load": set(),
    "eval": set(),
    "exec": set(),
    "os.system": set(),
}


def calls(path):
    """What a module calls: ``name``, ``module.name``, or ``.name`` of anything; and arguments that run foreign code."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        for word in node.keywords:
            if word.arg in ("shell", "trust_remote_code") and getattr(word.value, "value", None) is True:
                yield f"{word.arg}=True"
        if isinstance(node.func, ast.Name):
            yield node.func.id
        elif isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else "it"
            yield f"{owner}.{node.func.attr}"
            # A path has one new name; a string has two arguments.
            if node.func.attr != "replace" or (len(node.args) == 1 and not node.keywords):
                yield f".{node.func.attr}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_written_and_read_by_one_helper_and_nothing_runs_what_it_reads(path):
    name = path.relative_to(ROOT).as_posix()
    wrong = {one for one in calls(path) if one.endswith("=True") or name not in FORBIDDEN.get(one, {name})}
    assert not wrong, f"{name}: {wrong}; see scout_hf.files"


def test_the_check_sees_what_it_is_for(tmp_path):
    bad = tmp_path / "bad.py"
    lines = ["path.write_text(b)", "os.replace(a, b)", "a.b().replace(b)", "json.loads(b)", "f(shell=True)", "eval(b)"]
    bad.write_text("\n".join(lines))
    assert {".write_text", "os.replace", ".replace", "json.loads", "shell=True", "eval"} <= set(calls(bad))
