"""The command line around lm-eval: what is passed on, what is refused, RULER, and two processes."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from scout_hf.cli import app
from scout_hf.eval import harness
from scout_hf.eval.harness.command import is_network_failure, main
from scout_hf.eval.harness.pocket_longbench import DATASETS, LONGBENCH_E, make_longbench

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="no lm-eval")


# -- without lm-eval ------------------------------------------------------------------------------------------------


def test_without_lm_eval_the_extra_is_named(monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find_spec(name))
    assert main(["run", "--model", "scout"]) == 2
    assert "pip install 'scout_hf[eval]'" in capsys.readouterr().err
    with pytest.raises(ImportError, match=r"scout_hf\[eval\]"):
        harness.ScoutLM  # noqa: B018
    with pytest.raises(AttributeError, match="nonesuch"):
        harness.nonesuch  # noqa: B018


def test_make_data_writes_longbench_files_and_needs_nothing_else(tmp_path):
    result = CliRunner().invoke(app, ["lm-eval", "make-data", str(tmp_path), "--rows", "3", "--tokens", "256"])
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{name}.jsonl" for name in (*DATASETS, *(f"{name}_e" for name in LONGBENCH_E))}
    for path in tmp_path.iterdir():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert len(rows) == len({row["context"] for row in rows}) == 3
        for row in rows:
            assert {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"} == set(row)
            assert f"{row['dataset']}.jsonl" == path.name
            assert (row["all_classes"] is None) == (not row["dataset"].startswith("trec"))
    (tmp_path / "again").mkdir()
    for path in make_longbench(tmp_path / "again", 3, 256):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    with pytest.raises(ValueError, match="tokens=64"):
        make_longbench(tmp_path, 3, 64)


# -- what is passed on ----------------------------------------------------------------------------------------------


@needs_lm_eval
def test_help_has_our_options_and_those_of_lm_eval(capsys, monkeypatch):
    for command in (["run", "--help"], ["run", "-h"]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 0
        told = capsys.readouterr().out
        assert "--longbench-dir" in told and "--apply_chat_template" in told and "scoring=decode|prefill" in told
    result = CliRunner().invoke(app, ["lm-eval", "run", "--help"])
    assert result.exit_code == 0 and "--beside-stock" in result.output and "--num_fewshot" in result.output
    # Every task's file would be read for its output type, which is not listed here.
    monkeypatch.setattr("lm_eval.tasks.manager.load_yaml", lambda *_, **__: {})
    result = CliRunner().invoke(app, ["lm-eval", "ls", "tags"])
    assert result.exit_code == 0 and "longbench_tasks" in result.output


@needs_lm_eval
def test_arguments_reach_lm_eval_untouched(monkeypatch):
    from lm_eval._cli import HarnessCLI

    seen = []
    monkeypatch.setattr(HarnessCLI, "execute", lambda self, args: seen.append(args))
    before = list(sys.argv)
    given = (
        "run --model hf --model_args pretrained=a,budget=0.1 dtype=bfloat16 --tasks x,y z --limit 0.5 --seed 1,2,3,4"
    )
    assert main([*given.split(), "--gen_kwargs", "until=['\\n']", "--metadata", '{"max_seq_lengths": [4096]}']) == 0
    (args,) = seen
    assert args.model_args == {"pretrained": "a", "budget": 0.1, "dtype": "bfloat16"}
    assert args.tasks == ["x", "y", "z"] and args.limit == 0.5 and args.seed == [1, 2, 3, 4]
    assert args.gen_kwargs == {"until": ["\n"]} and args.metadata == {"max_seq_lengths": [4096]}
    assert not hasattr(args, "longbench_dir") and sys.argv == before
    # Without its name, as lm-eval allows.
    assert main(["--model", "scout", "--tasks", "x"]) == 0 and seen[1].model == "scout"


# -- what is refused ------------------------------------------------------------------------------------------------


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--beside-stock", "--model", "hf", "--tasks", "x"], "compares `--model scout`.*--model is 'hf'"),
        (["run", "--beside-stock", "--tasks", "x"], "--model is None"),
        (
            ["run", "--beside-stock", "--model", "scout", "--model_args", "attention=stock", "--tasks", "x"],
            "sets attention",
        ),
        (["ls", "tasks", "--longbench-dir", "somewhere"], "belong to `run`"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message, capsys):
    import re

    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and re.search(message, told)


@needs_lm_eval
def test_a_wrong_setting_ends_in_its_message(pocket_path, capsys):
    arguments = [
        "run",
        "--model",
        "scout",
        "--model_args",
        f"pretrained={pocket_path},block_size=33",
        "--tasks",
        "wikitext",
    ]
    result = CliRunner().invoke(app, ["lm-eval", *arguments])
    assert result.exit_code == 2
    assert main(arguments) == 2
    assert "error: block_size=33 is not allowed" in capsys.readouterr().err


@needs_lm_eval
def test_only_failures_of_the_network_are_told_as_such():
    import requests
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    for error in (
        ConnectionError("x"),
        OfflineModeIsEnabled("x"),
        LocalEntryNotFoundError("x"),
        requests.ConnectionError(),
    ):
        assert is_network_failure(error)
        try:
            try:
                raise error
            except Exception as inner:
                raise OSError("no model") from inner
        except OSError as outer:
            assert is_network_failure(outer)
    for error in (ValueError("x"), OSError("no space"), KeyError("task"), requests.HTTPError()):
        assert not is_network_failure(error)


@needs_lm_eval
@pytest.mark.parametrize(
    ("model", "task", "message"),
    [(None, "nonesuch", "Tasks not found: nonesuch"), ("/not/there", "wikitext", "Repo id")],
)
def test_a_name_that_is_not_found_ends_in_its_message(pocket_path, capsys, model, task, message):
    assert main(["run", "--model", "scout", "--model_args", f"pretrained={model or pocket_path}", "--tasks", task]) == 2
    told = capsys.readouterr().err
    assert message in told and "error: " in told and "Traceback" not in told


@needs_lm_eval
def test_other_errors_are_raised(pocket_path, monkeypatch):
    from lm_eval._cli import HarnessCLI

    # Of a closed pipe Python has a connection error.
    for error in (ValueError("x"), RuntimeError("Tasks"), BrokenPipeError(32, "Broken pipe")):
        monkeypatch.setattr(HarnessCLI, "execute", raiser(error))
        with pytest.raises(type(error)) as caught:
            main(["run", "--model", "scout", "--model_args", f"pretrained={pocket_path}", "--tasks", "wikitext"])
        assert caught.value is error


def raiser(error):
    def execute(*args):
        raise error

    return execute


# -- other tasks ----------------------------------------------------------------------------------------------------


@needs_lm_eval
def test_ruler_by_name(pocket_path, monkeypatch, tmp_path):
    """Its texts are made on the spot and sized by the model's tokenizer; the one download is of a sentence splitter."""
    nltk, wonderwords = pytest.importorskip("nltk"), pytest.importorskip("wonderwords")
    monkeypatch.setattr(nltk, "download", lambda *args, **options: False)

    class FewWords:
        """All pairs of an adjective and a noun are millions."""

        def __init__(self):
            kinds = ("nouns", "adjectives", "verbs")
            self._categories = {kind: [f"{kind[:-1]}{number}" for number in range(30)] for kind in kinds}

    monkeypatch.setattr(wonderwords, "RandomWord", FewWords)
    lengths = ["--metadata", '{"max_seq_lengths": [512]}', "--limit", "2", "--gen_kwargs", "max_gen_toks=4"]
    arguments = ["--model_args", f"pretrained={pocket_path},budget=64,window=16,block_size=16", "--device", "cpu"]
    out = ["--output_path", str(tmp_path), "--log_samples"]
    tasks = "niah_single_1,ruler_fwe"
    assert main(["run", "--model", "scout", "--tasks", tasks, *arguments, *lengths, *out]) == 0
    written = _written(tmp_path, "512,none")
    assert set(written["scores"]) == {"niah_single_1", "ruler_fwe"}
    assert all(0 < cost["attended_share"] < 1 for cost in written["cost"].values())


# -- several processes ----------------------------------------------------------------------------------------------


@needs_lm_eval
@pytest.mark.full
def test_two_processes_give_the_results_of_one(pocket_path, tmp_path):
    """An odd number of rows, so that lm-eval pads one process; scores, answers and sums are those of one process."""
    data = tmp_path / "data"
    make_longbench(data, 5, 256)
    arguments = ["run", "--model", "scout", "--model_args", f"pretrained={pocket_path},budget=None,dtype=float32"]
    arguments += ["--tasks", "longbench_triviaqa,longbench_trec", "--longbench-dir", str(data), "--batch_size", "2"]
    arguments += ["--gen_kwargs", "max_gen_toks=6", "--log_samples", "--output_path"]
    assert main([*arguments, str(tmp_path / "one"), "--device", "cpu"]) == 0
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no".split()
    launch += ["--dynamo_backend", "no", "--main_process_port", "0", "-m", "scout_hf.eval.harness"]
    settings = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "LMEVAL_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", *launch, *arguments, str(tmp_path / "two")]
    done = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| longbench_trec") + done.stdout.count("|longbench_trec") == 1, "one process reports"
    one, two = (_written(tmp_path / name) for name in ("one", "two"))
    assert two["scores"] == one["scores"] and two["answers"] == one["answers"]
    assert len(two["answers"]["longbench_trec"]) == 5
    for task, cost in two["cost"].items():
        # Padding makes the process with fewer rows repeat one.
        assert cost["decode_tokens"] >= one["cost"][task]["decode_tokens"] > 0
        assert cost["attended_share"] == 1
    assert sum(cost["decode_tokens"] for cost in two["cost"].values()) <= 12 * 5


def _written(folder, metric="score,none"):
    (results,) = [json.loads(path.read_text()) for path in folder.rglob("results_*.json")]
    answers = {}
    for path in folder.rglob("samples_*.jsonl"):
        rows = sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda row: row["doc_id"])
        answers[path.name.removeprefix("samples_").rsplit("_", 1)[0]] = [row["filtered_resps"] for row in rows]
    scores = {task: metrics[metric] for task, metrics in results["results"].items()}
    return {"scores": scores, "answers": answers, "cost": results["config"]["scout_hf"]["tasks"]}
