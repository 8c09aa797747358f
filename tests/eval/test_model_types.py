"""`scout-hf families`: what became of each model type is found out, kept, shown, and not lost."""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from scout_hf import attention
from scout_hf.cli import app
from scout_hf.errors import ConfigError
from scout_hf.eval.families import building, check, record, report, run
from scout_hf.eval.families.kinds import NAMED, PROBE, REFUSED, SERVED, STOCK, UNBUILT, WRONG, Found
from scout_hf.eval.markdown import between_marks, to_markdown
from scout_hf.patches import family_of

RECORDS = record.known()
HERE = RECORDS.get(transformers.__version__)
PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_records_are_whole_and_enough_is_served():
    assert list(RECORDS) == ["5.4.0", "5.17.0", "5.24.0"]
    for version, held in RECORDS.items():
        assert held["transformers"] == version
        assert not [name for name, one in held["types"].items() if one["kind"] == WRONG]
        for name, one in held["types"].items():
            served = one["kind"] in SERVED
            assert bool(one["reason"]) != served, name
            assert not served or one["error"] <= check.MOST and one["prediction"] in ("exact", "off"), name
    assert sum(one["kind"] in SERVED for one in RECORDS["5.24.0"]["types"].values()) >= 100


@pytest.mark.skipif(HERE is None, reason=f"no record for transformers {transformers.__version__}")
def test_the_record_has_all_types():
    assert sorted(HERE["types"]) == run.all_types()


def test_the_page_is_that_of_the_records():
    made = to_markdown(report.page(list(RECORDS.values()))).replace("<", "&lt;")
    assert between_marks(PAGE.read_text(encoding="utf-8"), report.COMMAND)[1].strip() == made, (
        "run: scout-hf families --page docs/families.md"
    )


@pytest.mark.skipif(HERE is None, reason=f"no record for transformers {transformers.__version__}")
@pytest.mark.parametrize("name", ["llama", "gpt_oss", "olmo", "mamba", "bloom", "musicgen"])
def test_a_type_is_as_recorded(name):
    found = record.as_record({name: check.check(name)}, transformers.__version__, torch.__version__)
    assert {name: one["kind"] for name, one in found["types"].items()} == {name: HERE["types"][name]["kind"]}
    assert not record.what_is_wrong(found, HERE)


# -- what a check sees ------------------------------------------------------------------------------------------------


def test_an_error_of_one_in_a_hundred_thousand_is_seen(monkeypatch):
    monkeypatch.setattr(attention, "_finish", lambda *args, real=attention._finish: real(*args) * 1.00003)
    found = check.check("llama")
    assert found.kind == WRONG and "differ" in found.reason


def test_a_failing_pass_is_seen(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("planted")

    monkeypatch.setattr(attention, "_finish", fails)
    assert check.check("llama") == Found(WRONG, "RuntimeError: planted", "LlamaForCausalLM", padded=True)


def test_a_wrong_prediction_is_seen(monkeypatch):
    family = type(family_of(building.tiny_model("llama")))
    monkeypatch.setattr(family, "query", lambda *args, real=family.query: real(*args) * 1.001)
    found = check.check("llama")
    assert found.kind == NAMED and found.prediction.startswith("wrong: the query of layer 1")


def test_a_model_whose_context_does_not_matter_is_not_served(monkeypatch):
    real = building.tiny_model

    def deaf(model_type):
        model = real(model_type)
        for layer in model.model.layers:
            torch.nn.init.zeros_(layer.self_attn.v_proj.weight)
        return model

    monkeypatch.setattr(check, "tiny_model", deaf)
    found = check.check("llama")
    assert found.kind == UNBUILT and "do not depend" in found.reason


def test_stock_passes_are_no_service(monkeypatch):
    monkeypatch.setattr("scout_hf.generating.reason_to_generate_with_stock", lambda *args: "planted")
    found = check.check("llama")
    assert found.kind == STOCK and found.reason == "planted"


# -- what is lost -----------------------------------------------------------------------------------------------------

BEFORE = record.as_record(
    {
        "served": Found(NAMED, error=3e-7, prediction="exact"),
        "probed": Found(PROBE, error=3e-7, prediction="off"),
        "never": Found(REFUSED, "why"),
    },
    "5.24.0",
    "2.13.0",
)


@pytest.mark.parametrize(
    "name, now, version, said",
    [
        ("served", Found(PROBE, prediction="exact"), "5.24.0", None),
        ("served", Found(REFUSED, "because"), "5.24.0", "served was served .* 5.24.0, and is now refused: because"),
        ("served", Found(STOCK, "because"), "5.25.0", "is now stock"),
        ("served", Found(UNBUILT, "because"), "5.24.0", "is now not built"),
        ("served", Found(UNBUILT, "because"), "5.25.0", None),
        ("served", Found(NAMED, prediction="off"), "5.24.0", "queries were predicted"),
        ("probed", Found(NAMED, prediction="off"), "5.24.0", None),
        ("never", Found(WRONG, "logits differ"), "5.24.0", "never is wrong: logits differ"),
        ("never", Found(REFUSED, "another"), "5.24.0", None),
        ("new", Found(REFUSED, "another"), "5.25.0", None),
        ("new", Found(WRONG, "logits differ"), "5.25.0", "new is wrong"),
    ],
)
def test_what_is_lost_is_told(name, now, version, said):
    told = record.what_is_wrong(record.as_record({name: now}, version, "2.13.0"), BEFORE)
    assert not told if said is None else len(told) == 1 and re.search(said, told[0])


def test_a_record_is_of_its_release_or_one_before():
    held = {version: {"transformers": version} for version in ("5.4.0", "5.17.0", "5.24.0")}
    wanted = {"5.4.0": "5.4.0", "5.5.1": "5.4.0", "5.17.0": "5.17.0", "5.23.0": "5.17.0", "5.100.0": "5.24.0"}
    assert {version: record.record_for(version, held)["transformers"] for version in wanted} == wanted
    assert record.number_of("5.24.0.dev0") == (5, 24, 0)
    with pytest.raises(ConfigError, match="no record of model types for transformers 5.0.0"):
        record.record_for("5.0.0", held)


# -- the command ------------------------------------------------------------------------------------------------------


def call(*words):
    return CliRunner().invoke(app, ["families", *map(str, words)])


@pytest.fixture
def found(monkeypatch):
    """What the next check finds, without trying anything."""
    now = {"llama": Found(NAMED, error=3.14e-7, layers="4 of 4", prediction="exact")}
    monkeypatch.setattr("scout_hf.eval.families.run.checked", lambda types, jobs: now)
    monkeypatch.setattr(record, "known", lambda: copy.deepcopy(RECORDS))
    return now


def test_the_command_checks_and_keeps(found, tmp_path):
    done = call("--check", "--out", tmp_path)
    assert done.exit_code == 0 and "llama" in done.stdout and "1 type: 1 named" in done.stdout
    held = record.read_json(tmp_path / f"{transformers.__version__}.json", record.RULE, "")
    assert held["types"]["llama"]["error"] == 3e-7


def test_the_command_fails_for_what_is_lost(found):
    found["llama"] = Found(REFUSED, "planted")
    done = call("--check")
    assert done.exit_code == 1 and "llama was served" in done.stderr and "llama: refused: planted" in done.stdout


def test_the_command_shows_the_record(found):
    done = call("--type", "llama", "--type", "mamba")
    assert done.exit_code == 0 and "llama" in done.stdout and "mamba: refused" in done.stdout
    assert "2 types: 1 named, 1 refused" in done.stdout
    assert "named: served exactly, with a family" in done.stdout and "layers: how many" in done.stdout


def test_a_refused_type_has_a_reason_and_no_table(found):
    done = call("--type", "bloom")
    assert done.exit_code == 0 and "1 type: 1 refused" in done.stdout and "─" not in done.stdout
    assert "bloom: refused: BloomForCausalLM" in done.stdout and "layers: how many" not in done.stdout


@pytest.mark.parametrize(
    "words, said", [(("--type", "lama"), "did you mean 'llama'"), (("--out", "x"), "--out is for the record")]
)
def test_wrong_options_are_told(words, said):
    done = call(*words)
    assert done.exit_code == 2 and said in done.stderr


def test_an_unknown_type_is_told_before_anything_is_tried():
    with pytest.raises(ConfigError, match="'lama' is no type of a causal.* did you mean 'llama'"):
        run.checked(["lama"], 1)
