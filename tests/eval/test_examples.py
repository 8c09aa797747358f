"""Every example runs and ends in ok: one after the other in one process, since most of their time is imports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


def test_there_are_examples_and_none_shadows_a_module():
    assert len(EXAMPLES) >= 4
    assert not {path.stem for path in EXAMPLES} & (set(sys.stdlib_module_names) | {"torch", "transformers", "scout_hf"})


RUN = """
import runpy, sys
paths = sys.argv[1:]
for path in paths:
    print("==", path, flush=True)
    sys.argv = [path]
    runpy.run_path(path, run_name="__main__")
"""


def run(folder, *command):
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "error::FutureWarning", *map(str, command)]
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """All of them in one process; one that fails is the last that began."""
    return run(tmp_path_factory.mktemp("examples"), "-c", RUN, *EXAMPLES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, together):
    parts = dict(part.split("\n", 1) for part in f"\n{together.stdout}".split("\n== ")[1:])
    assert str(path) in parts, f"another one ended the process: {together.stderr}"
    assert parts[str(path)].splitlines()[-1] == "ok", together.stdout + together.stderr


def test_they_end_well_and_warn_of_nothing(together):
    assert together.returncode == 0, together.stderr
    check_warnings(together)


@pytest.mark.full
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_on_its_own(path, tmp_path):
    done = run(tmp_path, path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "ok", done.stdout + done.stderr
    check_warnings(done)


@pytest.mark.full
def test_ranks_give_the_answer_of_one_process(tmp_path):
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    done = run(tmp_path, *command, EXAMPLES[0].with_name("tensor_parallel.py"))
    told = [line for line in done.stdout.splitlines() if line.startswith("rank ")]
    assert done.returncode == 0 and done.stdout.split().count("ok") == 2, done.stdout + done.stderr
    parts = {line.partition(": ")[2] for line in told}
    assert len(told) == 2 and len(parts) == 1


def check_warnings(done):
    # An older pipeline calls generate() in a way that its own release deprecates.
    assert not [line for line in done.stderr.splitlines() if "deprecated" in line and "past_key_values" in line]
