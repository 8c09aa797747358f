"""The comparison of transformers' own tests on stock and on patched models; the tests themselves are not run here."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.upstream import outcomes, run, source
from tests.upstream.outcomes import Outcome, compare, exceptions_for, generating

PASSED, FAILED = Outcome("passed", calls=1, steps=3), Outcome("failed", calls=1, message="AssertionError")


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
