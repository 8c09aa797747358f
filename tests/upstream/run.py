"""Run transformers' own generation tests on patched models: what passes unpatched must pass patched, with its numbers.

    python -m tests.upstream.run                              three families, pressed
    python -m tests.upstream.run --all                        ten families, pressed and as they are
    python -m tests.upstream.run --source ~/transformers llama opt

Pressed: with longer prompts and answers, so that there is KV on both tiers, with larger weights, so that what is
attended matters, without a sliding window in every layer, and without the attention weights that many tests ask for,
which only stock attention gives; tests that compile are left out. Every family runs unpatched, then with
split="off" and split="cpu". Of every generate() call of a test, the tokens and the logits of each forward pass must be
those of the unpatched run.

The tests are those of a checkout (``--source``, or ``TRANSFORMERS_TESTS``), else of a tag cloned into a temporary
folder, by default the installed release's. Exit code 0: holds; 1: does not; 77: the tests can't be had.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.upstream import same_numbers
from tests.upstream.outcomes import STOCK, Comparison, Outcome, compare, exceptions_for, generating, read
from tests.upstream.same_numbers import Numbers
from tests.upstream.source import NoTestsError, lay_out

HERE = Path(__file__).parent
SOME = ["llama", "gemma3", "gpt_neox"]
ALL = ["llama", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "mixtral", "gpt_neox", "opt", "granite"]
SPLITS = ["off", "cpu"]
AS_THEY_ARE = ["-m", "generate"]
PRESSED = ["-m", "generate and not torch_compile_test", "-k", "not compil"]
CANNOT = 77


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="upstream-tests-") as folder:
        work = Path(folder, "work")
        work.mkdir()
        try:
            source = lay_out(work, options.source, options.tag)
        except NoTestsError as error:
            print(f"transformers' tests can't be had ({error}); give a checkout with --source, nothing was run")
            return CANNOT
        listed = json.loads((HERE / "exceptions.json").read_text(encoding="utf-8"))
        results = options.results or work / "results"
        results.mkdir(parents=True, exist_ok=True)
        arms = functools.partial(_arm, work, source, results, options.models)
        held = [_compare(arms, pressed, options, listed) for pressed in options.pressed]
    print(f"{'holds' if all(held) else 'does NOT hold'}; {time.time() - began:.0f} s")
    return 0 if all(held) else 1


def _compare(arm, pressed: bool, options: argparse.Namespace, listed: list[dict[str, str]]) -> bool:
    """All families on stock, then what a patch can change with every split."""
    stock = arm(pressed, None, None)
    tests = generating(stock)
    with ThreadPoolExecutor(options.jobs) as pool:
        patched = dict(zip(SPLITS, pool.map(lambda split: arm(pressed, split, tests), SPLITS)))
    held = True
    for model in options.models:
        before = _of(model, stock)
        if not generating(before):
            print(f"{model:8} no generation test passes unpatched; --results keeps the logs")
            held = False
            continue
        for split, after in patched.items():
            after = _of(model, after)
            same = _numbers(before, after)
            found = compare(before, after, exceptions_for(listed, split), same.differ)
            _show(f"{model:8} {_manner(pressed):11} {split:3}", found, same)
            held = held and found.holds and same.calls > 0
    return held


def _numbers(stock: dict[str, Outcome], patched: dict[str, Outcome]) -> Numbers:
    """Of all tests that pass in both arms, which therefore made all their calls."""
    found = Numbers()
    for test in generating(stock):
        if test in patched and patched[test].outcome == "passed":
            found.add(test, *(same_numbers.read(arm[test].record) for arm in (stock, patched)))
    return found


def _arm(work: Path, source: Path, results: Path, models: list[str], pressed: bool, split, only) -> dict[str, Outcome]:
    """Run the families' tests in one process, patched for a split or not (None), all or some, and read what came."""
    name = f"{_manner(pressed)}-{split or STOCK}"
    path, settings = results / f"{name}.jsonl", results / f"{name}.json"
    path.unlink(missing_ok=True)
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    arm = {"split": split, "pressed": pressed, "source": str(source), "results": str(path), "only": only}
    settings.write_text(json.dumps(arm), encoding="utf-8")
    env = {**os.environ, "SCOUT_ARM": str(settings), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1]), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", *(f"{_folder(model)}test_modeling_{model}.py" for model in models)]
    command += "--rootdir . -p scout_upstream_arm --noconftest -p no:cacheprovider -p no:xdist -o addopts=".split()
    command += ["-q", "--tb=short", "--timeout=300", "--continue-on-collection-errors"]
    command += PRESSED if pressed else AS_THEY_ARE
    with open(results / f"{name}.log", "w", encoding="utf-8") as log:
        subprocess.run(command, cwd=work, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
    return read(path)


def _folder(model: str) -> str:
    return f"tests/models/{model}/"


def _of(model: str, outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    return {test: outcome for test, outcome in outcomes.items() if test.startswith(_folder(model))}


def _show(name: str, found: Comparison, same: Numbers) -> None:
    print(
        f"{name}: {found.passed_stock} pass unpatched, {found.generating} of them generate; patched {found.passed} "
        f"pass, {len(found.listed)} listed, {len(found.unexpected)} fail; {found.steps} decode steps",
        flush=True,
    )
    apart = ", ".join(f"at most {size:.1e} in {dtype}" for dtype, size in same.greatest.items()) or "none"
    left_out = "".join(f"; {count} {why}" for why, count in sorted(same.left_out.items()))
    print(
        f"    {same.calls} generate() calls compared, {same.passes} forward passes; logits apart, in parts of the "
        f"largest: {apart}{left_out}",
        flush=True,
    )
    for test, reason in found.listed.items():
        print(f"    listed  {test.split('::', 1)[1]}: {reason}")
    for test, message in found.unexpected.items():
        print(f"    FAILS   {test}\n{_indented(message)}")
    for pattern in found.unused:
        print(f"    listed, but passes: {pattern}")
    if found.generating and not found.steps:
        print("    no decode step was served by scout_hf")


def _manner(pressed: bool) -> str:
    return "pressed" if pressed else "as-they-are"


def _indented(message: str) -> str:
    return "\n".join(f"            {line}" for line in message.splitlines()[-12:])


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"families, as folders of tests/models (default: {' '.join(SOME)})")
    parser.add_argument("--all", action="store_true", help=f"{' '.join(ALL)}, pressed and as they are")
    parser.add_argument("--source", type=Path, default=os.environ.get("TRANSFORMERS_TESTS"), help="a checkout")
    parser.add_argument("--tag", help="the tag to clone (default: that of the installed release)")
    parser.add_argument("--jobs", type=int, default=2, help="splits at a time")
    parser.add_argument("--results", type=Path, help="a folder to keep logs and outcomes in")
    options = parser.parse_args(arguments)
    options.models = options.models or (ALL if options.all else SOME)
    options.pressed = [True, False] if options.all else [True]
    options.source = Path(options.source) if options.source else None
    options.results = options.results.resolve() if options.results else None
    return options


if __name__ == "__main__":
    sys.exit(main())
