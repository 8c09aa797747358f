"""`scout-hf batch`: a file of prompts by a model that is named, and what is told of it."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scout_hf.batch.ledger import Ledger
from scout_hf.cli import app
from scout_hf.eval.batch import command
from scout_hf.eval.language.reference import reference_text
from scout_hf.eval.text import load_text_model

CHAT = "{% for one in messages %}<{{ one['role'] }}> {{ one['content'] }}\n{% endfor %}<assistant> "
EXACT = ["--set", "budget=none", "--set", "block_size=16"]
TEXTS = [reference_text()[start : start + 1500] for start in (0, 3000)]
ROWS = [{"id": f"{text}{number}", "prompt": f"{TEXTS[text]} {number}?"} for number in range(3) for text in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The packaged text model with a chat template."""
    path = tmp_path_factory.mktemp("models") / "talker"
    model, tokenizer = load_text_model()
    tokenizer.chat_template = CHAT
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("SCOUT_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return tmp_path


def batch(folder, *words, code=0, out="out.jsonl"):
    """What was told, and the rows by id."""
    words = ["batch", folder, "in.jsonl", out, "--new-tokens", 5, *EXACT, *words]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, (done.output, done.exception)
    rows = Path(out).read_text(encoding="utf-8").splitlines() if Path(out).exists() else []
    return done.stderr, {row["id"]: row for row in map(json.loads, rows)}


def test_rows_are_answered_and_their_cost_is_told(place, folder):
    told, rows = batch(folder)
    counted = r"out.jsonl: 6 rows, 0 of them failed; of (\d+) tokens in 6 prompts read (\d+), found 0 in the store, and"
    prompted, read = map(int, re.search(counted + " shared the rest in 2 groups", told).groups())
    assert prompted == sum(row["prompt_tokens"] for row in rows.values()) and read < 0.5 * prompted
    assert [row["id"] for row in ROWS] == list(rows) and Path("cache/store").is_dir()
    assert "0 prompts read 0" in batch(folder)[0]
    assert "found 0 in the store\n" in batch(folder, "--no-store", out="again.jsonl")[0]


def test_prompts_go_through_the_template_unless_they_are_plain(place, folder):
    tokenizer = command.load_tokenizer(str(folder))
    (row, *_), lengths = ROWS, []
    for out, more in (("chat.jsonl", []), ("plain.jsonl", ["--plain"])):
        lengths.append(batch(folder, *more, out=out)[1][row["id"]]["prompt_tokens"])
    texts = (f"<user> {row['prompt']}\n<assistant> ", row["prompt"])
    assert lengths == [len(tokenizer(text).input_ids) for text in texts]


def test_failed_rows_are_told_by_the_exit_code(place, folder):
    with Path("in.jsonl").open("a") as file:
        file.write('{"id": "bad"}\n')
    told, rows = batch(folder, code=1)
    assert "7 rows, 1 of them failed" in told and rows["bad"]["error"] and rows["00"]["answer"]
    assert "1 prompts" in batch(folder, "--retry-failed", code=1)[0]


def test_other_settings_are_refused_and_an_interrupt_tells_how_to_go_on(place, folder, monkeypatch):
    add = Ledger.add

    def stop(self, row, weights):
        add(self, row, weights)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "add", stop)
        told, rows = batch(folder, code=130)
    assert "what was finished is in out.jsonl.part, and the same command goes on" in told and not rows
    told, _ = batch(folder, "--sample", "--generate", "temperature=0.5", code=2)
    assert "generate.do_sample=None, generate.temperature=None, and this run has generate.do_sample=True" in told
    told, rows = batch(folder)
    assert "5 prompts" in told and len(rows) == 6


@pytest.mark.parametrize(
    "words, told",
    [
        (["--generate", "temprature=1"], "'temprature': 1} is not allowed"),
        (["--set", "budget=-3"], "budget=-3 is not allowed"),
        (["--dtype", "x"], "--dtype x is not allowed"),
    ],
)
def test_wrong_options_are_told_before_a_model_is_loaded(words, told, place, folder, monkeypatch):
    monkeypatch.setattr(command, "model_of", lambda *_: pytest.fail("it was loaded"))
    assert told in batch(folder, *words, code=2)[0]
    assert {path.name for path in place.iterdir()} <= {"in.jsonl", "cache"}


def test_without_ray_that_is_told_first(place, folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    told, _ = batch(folder, "--ray", 2, code=2)
    assert "Ray Data needs ray, pandas, pyarrow: pip install 'scout_hf[ray]'" in told
