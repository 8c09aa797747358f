"""`scout_hf.batch.run` on a Ray cluster of two workers: groups go whole to one; nothing is lost with dead ones."""

import collections
from pathlib import Path

import pytest

from scout_hf.batch import RayWorkers, Settings, run
from scout_hf.batch.ledger import Ledger
from scout_hf.errors import BatchError, ConfigError
from tests.integration.batching import (
    BLOCK,
    EXACT,
    Doomed,
    documents,
    lines,
    questions,
    stock_answers,
    toy_model,
    toy_tokenizer,
    write,
)

ray = pytest.importorskip("ray", reason="make test-ray installs it")
pytest.importorskip("ray.data")

NEW, WORKERS = 4, 2
SETTINGS = Settings(max_new_tokens=NEW, patch=EXACT)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs, and this folder for the workers, who load the models of these tests."""
    settings = {"env_vars": {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}}
    ray.init(
        num_cpus=WORKERS,
        object_store_memory=100 << 20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env=settings,
    )
    yield
    ray.shutdown()


@pytest.fixture
def place(tmp_path, monkeypatch, cluster):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def added(monkeypatch):
    """The ids of rows in the order in which they were written down."""
    seen, add = [], Ledger.add
    monkeypatch.setattr(Ledger, "add", lambda self, row, weights: (seen.append(row["id"]), add(self, row, weights)))
    return seen


def batch(rows, load, place, **options):
    write("in.jsonl", rows)
    pool = RayWorkers(WORKERS)
    return run("in.jsonl", "out.jsonl", toy_tokenizer(), load, SETTINGS, store=place / "kv", ray=pool, **options)


def asked(place):
    """By process, the prompts that it was asked, in order."""
    found = collections.defaultdict(list)
    for line in (place / "asked").read_text().splitlines():
        process, _, text = line.partition(" ")
        found[process].append(text)
    return found


def test_200_prompts_about_10_documents_read_each_of_them_once(place, added):
    rows = questions(documents(10), 20)
    done = batch(rows, Doomed(place, "never"), place)
    assert (done.rows, done.failed, done.groups) == (200, 0, 10)
    assert sorted(added) == sorted(row["id"] for row in rows)
    # In order, and as by stock.
    assert [row["id"] for row in lines("out.jsonl")] == [row["id"] for row in rows]
    assert {row["id"]: row["answer"] for row in lines("out.jsonl")} == stock_answers(rows, NEW)
    whole, lengths = 216, [len(row["prompt"]) for row in rows]
    needed = 10 * whole + sum(lengths) - 200 * whole
    assert done.read_tokens + done.found_tokens == needed and done.found_tokens <= 9 * BLOCK
    by_process = [{text[:212] for text in texts} for texts in asked(place).values()]
    assert len(by_process) == WORKERS and sum(map(len, by_process)) == 10 == len(set.union(*by_process))
    # All documents are in the store now.
    again = run("in.jsonl", "b.jsonl", toy_tokenizer(), toy_model, Settings(1, patch=EXACT), store=place / "kv")
    assert again.found_tokens == 10 * whole and again.read_tokens == needed - 10 * whole


@pytest.mark.parametrize("times", [1, -1], ids=["once", "always"])
def test_a_killed_worker_loses_nothing_and_nothing_is_there_twice(times, place, added):
    rows = questions(documents(4), 5)
    bad = rows[7]
    done = batch(rows, Doomed(place, bad["prompt"][-12:], times), place)
    made = {row["id"]: row for row in lines("out.jsonl")}
    assert sorted(added) == sorted(made) == sorted(row["id"] for row in rows) and done.rows == 20
    failed = [name for name, row in made.items() if row["error"]]
    expected = stock_answers(rows, NEW)
    assert (place / "ends").read_text().count("\n") == (1 if times == 1 else 2)
    assert failed == ([] if times == 1 else [bad["id"]])
    assert {name: row["answer"] for name, row in made.items() if not row["error"]} == {
        name: answer for name, answer in expected.items() if name not in failed
    }
    if failed:
        assert made[bad["id"]]["error"] == "its worker died, 2 times of 2"


def test_a_model_that_cannot_be_loaded_is_told_in_one_line(place):
    rows = questions(documents(1), 2)
    with pytest.raises(BatchError, match=r"^the workers on Ray ended .*ZeroDivisionError") as error:
        batch(rows, lambda: 1 / 0, place)
    assert "\n" not in str(error.value) and not list(place.glob("out*"))


def test_wrong_numbers_of_workers():
    for options in ({"workers": 0}, {"workers": 1.5}, {"cpus": -1}, {"gpus": -0.5}):
        with pytest.raises(ConfigError, match="is not allowed"):
            RayWorkers(**options)
