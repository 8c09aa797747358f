"""The benchmark of lossless drafts at a tiny size: all numbers are there, and an arm that strays is an error."""

import dataclasses
import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from scout_hf.errors import ConfigError
from scout_hf.eval import drafts as command
from scout_hf.eval.bench import bandwidth, drafts, readme, report
from scout_hf.eval.bench.options import Drafts
from scout_hf.eval.records import read_record
from tests.eval.figures import check_numbers
from tests.integration.common import llama, prompt
from tests.patches.tiny import tiny_model

OPTIONS = Drafts("tiny", context=640, budget=64, most=3, new=24, exact_new=3, rounds=2, threads=1)
ARMS = ["drafts", "dense+drafts", "sparse", "dense", "exact steps", "one tier"]


def tokenizer(text, **_):
    """Always the same tokens, fewer of a short text."""
    return SimpleNamespace(input_ids=prompt(1, min(len(text), 700)))


def measured(patch, model=None, **changes):
    patch.setattr(bandwidth, "SPAN_BYTES", 1 << 24)
    told = []
    options = dataclasses.replace(OPTIONS, share=1e-2, **changes)
    record = drafts.run(options, told.append, loaded=(model or llama(), tokenizer))
    return record, told


@pytest.fixture(scope="module")
def record():
    with pytest.MonkeyPatch.context() as patch:
        return measured(patch)[0]


def test_the_record_is_complete(record):
    json.dumps(record, allow_nan=False)
    check_numbers(record, ("tokens_per_s", "gb_per_s", "link_gbps", ".tokens"))
    assert list(record["arms"]) == ARMS and record["ratios"]["dense/dense"] == 1
    assert record["link_gbps"] == pytest.approx(0.01 * record["read"]["gb_per_s"])
    for name, one in record["arms"].items():
        drafting = "drafts" in name
        assert len(one["rounds_tokens_per_s"]) == 2 and bool(one["drafted"]) == drafting == bool(one["checks"])
        assert one["tokens"] == (24 if drafting or name in ("sparse", "one tier") else 5)
        assert one["equal"] is (None if name == "sparse" else True)
        assert (one["acceptance"] is not None) == drafting == (one["tokens_per_exact_pass"] is not None)
    assert [row["name"] for row in record["targets"]] == ["drafts/dense", "dense+drafts/dense", "exact steps/dense"]


def test_it_is_read_back_and_told_in_markdown(record, tmp_path):
    (tmp_path / "drafts.json").write_text(json.dumps(record))
    text = readme.markdown(read_record(tmp_path / "drafts.json", "drafts"))
    assert text.count("\n| ") >= 7 and "| exact steps of drafting, two tiers | " in text
    (tmp_path / "drafts.json").write_text(json.dumps(record | {"arms": {"drafts": {"tokens": 1}}}))
    with pytest.raises(ConfigError, match="arms"):
        read_record(tmp_path / "drafts.json", "drafts")


def test_tables_fit_a_terminal_and_a_plot_is_made(record, tmp_path):
    sink = io.StringIO()
    busy = record | {"company": record["company"] | {"cpus_used_by_others": 0.7}}
    report.show(busy, Console(file=sink, width=80))
    text = sink.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text and "NOT QUIET" in text
    assert all(name in text for name in ARMS) and "must hold" in text
    pytest.importorskip("matplotlib")
    report.save(record, tmp_path)
    assert (tmp_path / "drafts.png").stat().st_size > 1000


def test_a_session_is_made_once_and_read_then(monkeypatch, tmp_path):
    kept = tmp_path / "prompt.kv"
    first, told = measured(monkeypatch, session=kept, rounds=1)
    assert kept.is_dir() and "reading 640 tokens" in told
    again, told = measured(monkeypatch, session=kept, rounds=1)
    assert "reading 640 tokens" not in told and all(
        one["equal"] is not False for each in (first, again) for one in each["arms"].values()
    )
    with pytest.raises(ConfigError, match="a session of another text or length"):
        measured(monkeypatch, session=kept, context=639)


def test_what_cannot_be_measured_is_said_first(monkeypatch, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("few")
    with pytest.raises(ValueError, match="the text has 3 tokens"):
        measured(monkeypatch, text=[short])
    with pytest.raises(ValueError, match="within the budget nothing is drafted"):
        measured(monkeypatch, budget=640)
    with pytest.raises(ConfigError, match="nothing was drafted .*not all kept"):
        measured(monkeypatch, tiny_model("gemma3"))


def test_an_arm_that_chooses_other_tokens_is_told(monkeypatch):
    generated = drafts._Bench._generated

    def other(self, cache, *args):
        speed, tokens = generated(self, cache, *args)
        return speed, tokens + (cache.scout_config.method == "dense" and cache.scout_config.budget is None)

    monkeypatch.setattr(drafts._Bench, "_generated", other)
    record, _ = measured(monkeypatch, rounds=1)
    assert [name for name, one in record["arms"].items() if one["equal"] is False] == ["dense"]
    sink = io.StringIO()
    report.show(record, Console(file=sink, width=80))
    assert sink.getvalue().count("NO,") == 1


@pytest.mark.parametrize("name", ["sparse", "drafts", "dense"])
def test_an_arm_that_does_not_what_its_name_says_is_an_error(name, monkeypatch):
    arms = drafts.arms_of(OPTIONS) | {name: drafts.arms_of(OPTIONS)["one tier"]._replace(exact=name != "sparse")}
    if name == "drafts":
        arms[name] = arms[name]._replace(drafts=True)
    monkeypatch.setattr(drafts, "arms_of", lambda options: arms)
    with pytest.raises((RuntimeError, ConfigError), match=name):
        measured(monkeypatch, rounds=1)


def test_the_module_runs_the_same(monkeypatch, tmp_path, record, capsys):
    given = []
    monkeypatch.setattr(Drafts, "measure", lambda self, tell: given.append(self) or record)
    monkeypatch.setattr(
        "sys.argv", ["drafts", "link", "tiny", "--context", "640", "--share", "0.5", "--out", str(tmp_path)]
    )
    command.main()
    assert given[0].context == 640 and given[0].share == 0.5 and given[0].yes
    assert (tmp_path / "drafts.json").is_file() and "dense+drafts" in capsys.readouterr().out


def test_generations_are_compared(monkeypatch, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("x" * 600)
    monkeypatch.setattr(command, "load", lambda *_, **__: (llama(), tokenizer))
    argv = ["drafts", "equal", "tiny", "--text", str(text), "--generations", "2", "--budget", "64", "--new", "12"]
    monkeypatch.setattr("sys.argv", argv)
    command.main()
    assert '"equal": 2' in capsys.readouterr().out
