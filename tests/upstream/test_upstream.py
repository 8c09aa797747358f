"""The comparison of transformers' own tests on stock and on patched models; the tests themselves are not run here."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers

from tests.upstream import outcomes, run, source
from tests.upstream.outcomes import Outcome, compare, exceptions_for, generating
from tests.upstream.same_numbers import Numbers

PASSED, FAILED = Outcome("passed", calls=1, steps=3), Outcome("failed", calls=1, message="AssertionError")
LOGITS = torch.tensor([[[0.0, 4.0, 3.0]]])
# What transformers' tests look like, as far as the two arms care; of one test a decode step's values are 5 % too large.
FAMILY = """
import pytest, torch, scout_hf.attention
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)

@pytest.mark.generate
@pytest.mark.parametrize("factor", [1.0, 1.05])
def test_sample(factor, monkeypatch):
    finish = scout_hf.attention._finish
    enlarge = lambda *given: finish(*given[:2], given[2]._replace(out=factor * given[2].out), *given[3:])
    monkeypatch.setattr(scout_hf.attention, "_finish", enlarge)
    model, ids = LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), torch.randint(3, 50, (2, 31))
    for settings in ({"do_sample": False}, {"do_sample": True, "return_dict_in_generate": True}):
        model.generate(ids, max_new_tokens=4, eos_token_id=-1, pad_token_id=0, **settings)
"""


@pytest.mark.full
def test_a_decode_step_whose_values_are_too_large_is_found_though_the_test_itself_passes(tmp_path, monkeypatch, capsys):
    checkout = tmp_path / "checkout"
    files = dict.fromkeys(source.NEEDED, "") | {"tests/models/planted/test_modeling_planted.py": FAMILY}
    files["src/transformers/__init__.py"] = f'__version__ = "{transformers.__version__}"'
    for name, text in files.items():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(text)
    monkeypatch.setattr(run, "SPLITS", ["cpu"])
    assert run.main(["--source", str(checkout), "planted"]) == 1
    said = capsys.readouterr().out
    assert "2 pass unpatched, 2 of them generate; patched 1 pass, 0 listed, 1 fail" in said
    assert "3 generate() calls compared" in said
    assert "FAILS   tests/models/planted/test_modeling_planted.py::test_sample[1.05]" in said
    assert "generate() call 0, step 1: float32 logits differ by" in said


def call(tokens=((5, 1),), logits=(LOGITS,), fed=None, raised=None, routed=False):
    passes = [{"fed": fed, "logits": part, "routed": routed} for part in logits]
    return {"tokens": None if raised else torch.tensor(tokens), "raised": raised, "passes": passes}


def hold(stock, patched):
    found = Numbers()
    found.add("a::x", stock, patched)
    return found


def test_equal_calls_are_counted_with_the_greatest_difference():
    found = hold([call(), call()], [call(), call(logits=[LOGITS + 1e-5])])
    assert (found.calls, found.passes, found.differ) == (2, 2, {})
    assert found.greatest["float32"] == pytest.approx(1e-5 / 4, rel=0.1)


@pytest.mark.parametrize(
    ("patched", "said"),
    [
        ([call(), call(logits=[LOGITS * 1.001])], "call 1, step 0: float32 logits differ by 1.0e-03 of the largest"),
        ([call(), call(logits=[LOGITS * torch.nan])], "call 1, step 0: float32 logits differ by nan"),
        ([call(), call(logits=[LOGITS[..., :2]])], "step 0: float32 (1, 1, 3) logits unpatched, float32 (1, 1, 2)"),
        ([call(), call(logits=[LOGITS.half()])], "step 0: float32 (1, 1, 3) logits unpatched, float16 (1, 1, 3)"),
        ([call(), call(logits=[LOGITS, LOGITS])], "call 1, 1 forward passes unpatched, 2 patched"),
        ([call(), call(fed=torch.tensor([[3]]))], "call 1, step 0: fed with other tokens"),
        ([call(), call(tokens=[[5, 2]])], "call 1, at its end: other tokens returned, whose logits are 2.5e-01 of the"),
        ([call(), call(tokens=[[4, 1]])], "call 1, at its end: other tokens returned"),
        ([call(), call(raised="ValueError")], "call 1, raised unpatched: None, patched: ValueError"),
        ([call()], "2 generate() calls unpatched, 1 patched"),
    ],
)
def test_what_differs_is_told_with_the_call_the_step_and_the_size(patched, said):
    differ = hold([call(), call()], patched).differ
    assert said in differ["a::x"]
    found = compare({"a::x": PASSED}, {"a::x": PASSED}, {}, differ)
    assert (found.passed, found.unexpected, found.holds) == (0, differ, False)


def test_a_tie_may_go_either_way_and_what_follows_it_is_not_compared():
    tie = torch.tensor([[[0.0, 4.0, 4.0]]])
    one, other = (call([[5, token]], [tie]) for token in (1, 2))
    found = hold([one, call()], [other, call(logits=[LOGITS * 2])])
    assert (found.calls, found.differ, dict(found.left_out)) == (1, {}, {"follow a tie": 1})
    steps = [call(logits=[tie, LOGITS]) for _ in range(2)]
    for made, token in zip(steps, (1, 2)):
        made["passes"][1]["fed"] = torch.tensor([[token]])
    assert hold(steps[:1], steps[1:]).differ == {}


def test_experts_that_half_precision_chose_otherwise_are_told_apart_from_errors():
    half = LOGITS.half()
    for dtype, routed, differs in ((half, True, False), (half, False, True), (LOGITS, True, True)):
        found = hold(*[[call(logits=[dtype * factor], routed=routed), call()] for factor in (1, 1.05)])
        assert (bool(found.differ), sum(found.left_out.values())) == (differs, 0 if differs else 2)


def test_calls_that_cannot_be_compared_are_counted_with_the_reason():
    found = hold(*[[call(raised="ValueError"), call(logits=())]] * 2)
    assert (found.calls, found.passes, sum(found.left_out.values())) == (1, 0, 2)


def test_what_passes_unpatched_and_fails_patched_is_found():
    found = compare({"a::x": PASSED, "a::y": PASSED}, {"a::x": PASSED, "a::y": FAILED}, {})
    assert (found.passed, found.unexpected, found.holds) == (1, {"a::y": "failed: AssertionError"}, False)


@pytest.mark.parametrize("patched", [{}, {"a::x": Outcome("skipped")}, {"a::x": Outcome("error")}])
def test_a_test_that_crashed_was_skipped_or_never_ran_does_not_pass(patched):
    assert not compare({"a::x": PASSED}, patched | {"a::y": PASSED}, {}).holds


def test_tests_that_fail_unpatched_or_generate_nothing_are_not_run_again():
    assert generating({"a::x": FAILED, "a::y": Outcome("passed", calls=0), "a::z": PASSED}) == ["a::z"]


def test_a_listed_exception_counts_for_its_split_and_has_to_be_needed():
    listed = [{"test": "*::x", "split": "cpu", "reason": "why"}]
    stock, both = {"a::x": PASSED, "a::y": PASSED}, {"a::x": FAILED, "a::y": PASSED}
    found = compare(stock, both, exceptions_for(listed, "cpu"))
    assert found.holds and found.listed == {"a::x": "why"}
    assert not compare(stock, both, exceptions_for(listed, "off")).holds
    assert compare(stock, {"a::x": PASSED, "a::y": PASSED}, exceptions_for(listed, "cpu")).unused == ["*::x"]


def test_an_arm_in_which_scout_decoded_nothing_proves_nothing():
    assert not compare({"a::x": PASSED}, {"a::x": Outcome("passed", calls=1, steps=0)}, {}).holds


def test_every_listed_exception_has_a_reason():
    entries = json.loads(Path(run.HERE, "exceptions.json").read_text())
    assert all(set(entry) <= {"test", "split", "reason"} and len(entry["reason"]) > 20 for entry in entries)


def test_outcomes_come_back_as_written(tmp_path):
    (tmp_path / "arm.jsonl").write_text(json.dumps({"test": "a::x"} | asdict(FAILED)) + "\n")
    assert outcomes.read(tmp_path / "arm.jsonl") == {"a::x": FAILED}
    assert outcomes.read(tmp_path / "absent.jsonl") == {}


def test_without_the_tests_it_says_so_and_ends_with_a_code_of_its_own(tmp_path, capsys):
    assert run.main(["--source", str(tmp_path)]) == run.CANNOT
    assert "has no tests/generation/test_utils.py" in capsys.readouterr().out


def test_the_tests_see_the_installed_release_as_their_source_tree(tmp_path, monkeypatch):
    checkout, work = tmp_path / "checkout", tmp_path / "work"
    for name in (*source.NEEDED, "src/transformers/testing_utils.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("of the checkout")
    work.mkdir()
    newer = tmp_path / "test_modeling_common.py"
    newer.write_text("of the release")
    monkeypatch.setattr(source, "released_tests", lambda folder: [newer])
    assert source.lay_out(work, checkout, None) == checkout
    assert (work / source.NEEDED[0]).read_text() == "of the checkout"
    assert (work / source.NEEDED[1]).read_text() == "of the release"
    assert (work / "src/transformers/testing_utils.py").read_text() != "of the checkout"
