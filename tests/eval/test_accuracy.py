"""The accuracy table on a small scale: selection keeps the answers, blind selection loses them."""

import json

import pytest
from typer.testing import CliRunner

from scout_hf.cli import app
from scout_hf.eval.accuracy import FULL, MODES, accuracy_table, make_quizzes, quiz_count

TOKENS, QUESTIONS = 1024, 12


@pytest.fixture(scope="module")
def scores(pocket):
    ticks = []
    table = accuracy_table(
        *pocket, TOKENS, QUESTIONS, budget=0.25, block_sizes=(16,), seed=3, tick=lambda: ticks.append(1)
    )
    assert len(ticks) == (QUESTIONS + quiz_count(TOKENS, QUESTIONS)) * len(table)
    return {one.mode: one for one in table}


def test_full_attention_answers(scores):
    assert scores[FULL].accuracy >= 0.75
    assert scores[FULL].attended_share == 1.0 and scores[FULL].block_size is None


def test_selection_keeps_the_answers(scores):
    assert scores["real query"].accuracy >= scores[FULL].accuracy - 0.25
    assert scores["predicted query"].accuracy >= scores[FULL].accuracy - 0.35
    assert scores["predicted query"].cosine > 0.5 and scores["real query"].cosine is None


def test_blind_selection_loses_them(scores):
    for mode in ("random blocks", "recent blocks"):
        assert scores[mode].accuracy <= scores[FULL].accuracy - 0.3
        assert scores[mode].accuracy < scores["real query"].accuracy


def test_equal_budgets_and_questions(scores):
    shares = {scores[mode].attended_share for mode in ("real query", "random blocks", "recent blocks")}
    assert len(shares) == 1 and 0.2 < shares.pop() < 0.3
    assert {one.asked for one in scores.values()} == {QUESTIONS}


def test_quizzes_follow_the_seed():
    quizzes = make_quizzes(1024, 30, seed=1)
    assert quizzes == make_quizzes(1024, 30, seed=1) != make_quizzes(1024, 30, seed=2)
    assert sum(len(facts) for _, facts in quizzes) == 30
    assert len({document.text for document, _ in quizzes}) == len(quizzes) >= 4
    assert all(len(set(facts)) == len(facts) for _, facts in quizzes)


def test_unknown_mode_is_named(pocket):
    with pytest.raises(ValueError, match="'guess'.*'real query'"):
        accuracy_table(*pocket, modes=("guess",))


def test_command_writes_what_it_measured(tmp_path):
    out = tmp_path / "accuracy.json"
    sizes = "--tokens 256 --questions 1 --budget 0.5 --block-size 16".split()
    result = CliRunner().invoke(app, ["accuracy", *sizes, "--out", str(out)])
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    assert record["settings"]["tokens"] == 256 and set(record["versions"]) == {"scout_hf", "torch", "transformers"}
    assert [one["mode"] for one in record["scores"]] == [FULL, *MODES]
    assert all(one["tokens_per_second"] > 0 for one in record["scores"])
