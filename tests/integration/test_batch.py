"""`scout_hf.batch.run`: what prompts share is read once; a run goes on where it was; no row is lost or there twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import scout_hf
from scout_hf.batch import RayWorkers, Settings, run, running
from scout_hf.batch.ledger import Ledger
from scout_hf.batch.worker import Worker
from scout_hf.errors import ConfigError, MissingFileError
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
from tests.patches.tiny import own_cache

NEW = 4
SETTINGS = Settings(max_new_tokens=NEW, patch=EXACT)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def batch(rows=None, settings=SETTINGS, load=toy_model, store="kv", source="in.jsonl", out="out.jsonl", **options):
    if rows is not None:
        write(source, rows)
    return run(source, out, toy_tokenizer(), load, settings, store=store, **options)


def answers(path="out.jsonl"):
    return {row["id"]: row["answer"] for row in lines(path)}


# -- what is answered, and what it costs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """Three texts with four questions each, and what stock says."""
    rows = questions(documents(3), 4)
    return rows, stock_answers(rows, NEW)


def test_each_document_is_read_once_and_answers_are_those_of_stock(place, small):
    rows, expected = small
    done = batch(rows)
    assert answers() == expected and len(set(expected.values())) > 6
    assert [row["id"] for row in lines("out.jsonl")] == [row["id"] for row in rows]
    assert (done.rows, done.failed, done.answered, done.groups) == (12, 0, 12, 3)
    lengths = [len(row["prompt"]) for row in rows]
    whole = (min(lengths) - 24) // BLOCK * BLOCK  # up to the question itself
    assert done.read_tokens + done.found_tokens == 3 * whole + sum(lengths) - 12 * whole
    assert done.prompt_tokens == sum(lengths) and done.found_tokens == 2 * BLOCK  # "You answer. "
    row = lines("out.jsonl")[0]
    assert list(row) == ["id", "answer", "error", "prompt_tokens", "new_tokens", "key"]
    assert row["prompt_tokens"] == lengths[0] and row["new_tokens"] == NEW and row["error"] is None
    assert {path.name for path in place.iterdir()} == {"in.jsonl", "out.jsonl", "kv"}


def test_other_questions_find_the_documents_of_an_earlier_run(place, small):
    batch(small[0])
    other = [row | {"prompt": row["prompt"][:212] + "Why?" + row["id"]} for row in small[0]]
    done = batch(other, out="other.jsonl")
    assert done.found_tokens >= 3 * 200 and answers("other.jsonl") == stock_answers(other, NEW)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next"])
def test_layers_with_states_of_their_own_go_on_from_what_is_shared(name, place, small):
    if reason := own_cache(name):
        pytest.skip(reason)
    done = batch(small[0], load=lambda: toy_model(name))
    assert answers() == stock_answers(small[0], NEW, name) and done.read_tokens < 0.5 * done.prompt_tokens


def test_without_a_store_everything_is_read(place, small):
    done = batch(small[0], store=None)
    assert done.read_tokens == done.prompt_tokens and not done.groups and answers() == small[1]
    assert not Path("kv").exists()


@pytest.mark.parametrize("keep_all", [False, True])
def test_what_nobody_shares_is_kept_only_if_that_is_wanted(place, keep_all):
    rows = questions(documents(2), 1)
    batch(rows, keep_all=keep_all)
    held = sum(len(segment.hashes) // 16 * BLOCK for segment in scout_hf.PrefixStore("kv").segments())
    assert held > 400 if keep_all else held == BLOCK
    assert answers() == stock_answers(rows, NEW)


def test_parquet_in_and_out_is_the_same(place, small):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [dict(row, id=number) for number, row in enumerate(small[0])]
    parquet.write_table(pyarrow.Table.from_pylist(rows), "in.parquet")
    write("in.jsonl", rows)
    batch(source="in.parquet", out="out.parquet")
    batch(out="out.jsonl")
    table = parquet.read_table("out.parquet")
    assert table.to_pylist() == lines("out.jsonl") and str(table.schema.field("id").type) == "int64"
    assert batch(source="in.jsonl", out="out.parquet").answered == 0


def test_sampled_answers_go_by_the_seed_alone(place, small):
    """Not by the store, the turn of a row or what else is in the file."""
    sampled = lambda seed: Settings(NEW, seed=seed, patch=EXACT, generate={"do_sample": True})  # noqa: E731
    torch.manual_seed(3)
    before = torch.get_rng_state()
    batch(small[0], sampled(1))
    assert torch.equal(torch.get_rng_state(), before)
    batch(small[0][::-1][:7], sampled(1), store=None, out="again.jsonl")
    batch(small[0], sampled(2), out="other.jsonl")
    first, again, other = map(answers, ("out.jsonl", "again.jsonl", "other.jsonl"))
    assert {name: first[name] for name in again} == again and first != small[1] and first != other


def test_chats_go_through_the_template(place):
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{% for one in messages %}[{{ one['role'] }}] {{ one['content'] }} {% endfor %}[bot] "
    said = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
    write("in.jsonl", [{"messages": said}, {"prompt": "Why?"}])
    for chat, prompt in ((False, "Why?"), (True, "[user] Why? [bot] ")):
        run("in.jsonl", f"{chat}.jsonl", tokenizer, toy_model, Settings(NEW, chat=chat, patch=EXACT))
        lengths = [row["prompt_tokens"] for row in lines(f"{chat}.jsonl")]
        assert lengths == [len("[system] Be short. [user] Why? [bot] "), len(prompt)]


def test_a_document_is_parted_where_a_worker_would_have_nothing_to_do(place, small, monkeypatch):
    taken = []

    def answers_on_ray(groups, recipe, pool):
        taken.extend(groups)
        yield from (result for group in groups for result in Worker(recipe).answers(group))

    monkeypatch.setattr(running, "answers_on_ray", answers_on_ray)
    monkeypatch.setattr(running, "must_have_ray", lambda: None)
    done = batch(small[0], ray=RayWorkers(5))
    assert sorted(len(group.prompts) for group in taken) == [2, 2, 2, 2, 4] and done.groups == 3
    assert {group.shared for group in taken} == {216} and answers() == small[1]


# -- a row that fails -------------------------------------------------------------------------------------------------


def test_failed_rows_carry_their_error_and_the_others_are_answered(place, small):
    rows, expected = small
    wrong = [{"id": "none"}, {"id": "both", "prompt": "a", "messages": []}, {"id": "long", "prompt": "a" * 600}]
    wrong += [{"id": "number", "prompt": 5}, {"id": "empty", "prompt": ""}]
    done = batch([*wrong, *rows], load=Doomed(place, rows[2]["prompt"][-12:], -1, fail=True))
    made = {row["id"]: row for row in lines("out.jsonl")}
    failed = {name for name, row in made.items() if row["error"]}
    assert failed == {"none", "both", "long", "number", "empty", rows[2]["id"]} and done.failed == 6
    assert "neither" in made["none"]["error"] and "both" in made["both"]["error"]
    assert "600 tokens" in made["long"]["error"] and "made for 512" in made["long"]["error"]
    assert made[rows[2]["id"]]["error"] == "RuntimeError: no memory for this one"
    assert made["long"]["answer"] is None
    assert {name: row["answer"] for name, row in made.items() if name not in failed} == {
        name: answer for name, answer in expected.items() if name not in failed
    }


def test_failed_rows_stay_so_unless_they_are_to_be_tried_again(place, small):
    rows, expected = small
    batch(rows, load=Doomed(place, rows[2]["prompt"][-12:], 1, fail=True))
    assert batch().answered == 0 and answers()[rows[2]["id"]] is None
    done = batch(retry_failed=True)
    assert done.answered == 1 and done.failed == 0 and answers() == expected
    # Its document is there.
    assert done.found_tokens >= 200 and done.read_tokens < 40


def test_a_damaged_document_is_read_again(place, small):
    rows, expected = small
    batch(rows)
    for segment in scout_hf.PrefixStore("kv").segments():
        pages = segment.path / "pages.safetensors"
        held = bytearray(pages.read_bytes())
        held[len(held) // 2 :] = bytes(len(held) - len(held) // 2)
        pages.chmod(0o600)
        pages.write_bytes(held)
    done = batch(out="again.jsonl")
    assert answers("again.jsonl") == expected and done.failed == 0


def test_a_model_that_the_store_does_not_serve_ends_the_run(place, small):
    def load():
        model = toy_model()
        model.config.use_bidirectional_attention = True
        return model

    with pytest.raises(ConfigError, match="leave store out"):
        batch(small[0], load=load)


# -- going on ---------------------------------------------------------------------------------------------------------

KILLED = """
from tests.integration.batching import Doomed, toy_tokenizer, EXACT
from scout_hf.batch import RayWorkers, Settings, run, running
import sys
run("in.jsonl", sys.argv[1], toy_tokenizer(), Doomed(".", sys.argv[2]), Settings({new}, patch=EXACT), store="kv")
"""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_killed_run_goes_on_and_nothing_is_lost_or_there_twice(kind, place, small, monkeypatch):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    rows, out = small[0], f"out.{kind}"
    write("in.jsonl", rows)
    batch(out=f"whole.{kind}", store="other")
    code = KILLED.format(new=NEW)
    end = rows[7]["prompt"][-12:]
    done = subprocess.run([sys.executable, "-c", code, out, end], cwd=place, env=_environment(), capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    kept = [row["id"] for row in lines(f"{out}.part")[1:]]
    assert 0 < len(kept) < 12 and rows[7]["id"] not in kept and not Path(out).exists()
    # As a kill in the middle of a write leaves it.
    with Path(f"{out}.part").open("ab") as file:
        file.write(b'{"id": "half", "answer": "\xc3')
    added, add = [], Ledger.add
    monkeypatch.setattr(Ledger, "add", lambda self, row, weights: (added.append(row["id"]), add(self, row, weights)))
    again = batch(out=out)
    assert again.answered == 12 - len(kept) and sorted(added + kept) == sorted(row["id"] for row in rows)
    assert Path(out).read_bytes() == Path(f"whole.{kind}").read_bytes()
    # What the killed one had read is in the store.
    assert again.found_tokens + again.read_tokens < again.prompt_tokens and not Path(f"{out}.part").exists()
    assert batch(out=out).answered == 0 and Path(out).read_bytes() == Path(f"whole.{kind}").read_bytes()


def _environment():
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def interrupted(rows, after, **options):
    """A run that its user stopped."""
    real = Ledger.add

    def add(self, row, weights):
        real(self, row, weights)
        if len(self.rows) == after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Ledger, "add", add)
        batch(rows, **options)


def test_other_settings_prompts_weights_and_rows_are_refused(place, small):
    rows, expected = small
    interrupted(rows, 5)
    for settings, told in (
        (Settings(NEW + 1, patch=EXACT), f"max_new_tokens={NEW}, and this run has max_new_tokens={NEW + 1}"),
        (Settings(NEW, patch=EXACT | {"block_size": 16}), f"patch.block_size={BLOCK}, and"),
        (Settings(NEW, patch=EXACT, generate={"do_sample": True}), "generate.do_sample=None, and this run has"),
        (Settings(NEW, patch=EXACT, model="b"), "model='toy', and this run has model='b'"),
    ):
        with pytest.raises(ConfigError, match="the same settings") as error:
            batch(settings=settings)
        assert told in str(error.value) and "out.jsonl.part" in str(error.value)
    first = lines("out.jsonl.part")[1]["id"]
    with pytest.raises(ConfigError, match=f"row '{first}' .* for another prompt"):
        batch([row | {"prompt": row["prompt"] + "?" * (row["id"] == first)} for row in rows])
    with pytest.raises(ConfigError, match=f"an answer to row '{first}', and there is no such row"):
        batch([row for row in rows if row["id"] != first])

    def other():
        model = toy_model()
        model.lm_head.weight.data.add_(0.01)
        return model

    with pytest.raises(ConfigError, match="other weights"):
        batch(rows, load=other)
    # None of that did harm.
    assert batch(rows).answered == 7 and answers() == expected
    with pytest.raises(ConfigError, match="another prompt or with other settings"):
        batch(settings=Settings(NEW + 1, patch=EXACT))


def test_rows_may_be_added_to_a_finished_run(place, small):
    rows, expected = small
    batch(rows[:5])
    done = batch(rows)
    assert done.answered == 7 and answers() == expected
    assert [row["id"] for row in lines("out.jsonl")] == [row["id"] for row in rows]


def test_a_run_that_was_killed_before_its_first_row_binds_nothing(place, small):
    write("out.jsonl.part", [{"format": "scout_hf.batch/1", "settings": {"max_new_tokens": 99}}])
    assert batch(small[0]).answered == 12


def test_two_runs_do_not_write_one_output(place, small):
    write("in.jsonl", small[0])
    with Ledger.opened(Path("out.jsonl"), SETTINGS), pytest.raises(ConfigError, match="another run is writing"):
        batch()
    assert not Path("out.jsonl.part").exists() and batch().answered == 12


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.part"])
def test_what_no_batch_wrote_is_not_touched(name, place, small):
    held = '{"id": 1}\n{"mine": 2}\n'
    Path(name).write_text(held)
    with pytest.raises(ConfigError, match="what a batch wrote"):
        batch(small[0])
    assert Path(name).read_text() == held


# -- what is wrong with files and settings ----------------------------------------------------------------------------

WRONG = {
    "no such file": (None, {"source": "no.jsonl"}, "no.jsonl is missing"),
    "no such kind": (None, {"source": "in.csv"}, "in.csv is not allowed: .*jsonl.*parquet; try in.jsonl"),
    "output of no kind": ("{}", {"out": "out.txt"}, "out.txt is not allowed"),
    "nothing": ("\n", {}, "holds no rows"),
    "no JSON": ('{"prompt": "a"}\n\n{"prompt', {}, "line 3, is not one JSON object"),
    "no object": ("[1]", {}, "line 1, is not one JSON object .*list"),
    "one id twice": ('{"id": 1}\n{"id": 1}', {}, "rows 0 and 1 are both called 1"),
    "ids of two kinds": ('{"id": "a"}\n{"id": 1}', {}, "row 1 has the id 1, and row 0 has 'a'"),
    "some ids": ('{"id": "a"}\n{}', {}, "rows without an id are called by their index"),
    "an id of no kind": ('{"id": [1]}', {}, r"row 0 has the id \[1\]"),
    "output is input": ("{}", {"out": "in.jsonl"}, "is both input and output"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_files_are_told_before_a_model_is_loaded(kind, place):
    text, options, told = WRONG[kind]
    if text is not None:
        Path("in.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=told):
        batch(load=lambda: pytest.fail("it was loaded"), **options)
    assert not list(place.glob("out*")) and not Path("kv").exists()


def test_a_missing_folder_is_an_error_of_files(place, small):
    with pytest.raises(OSError, match="no/out.jsonl"):
        batch(small[0], out="no/out.jsonl")
    with pytest.raises(MissingFileError):
        batch(source="no.jsonl")


@pytest.mark.parametrize(
    "options, told",
    [
        ({"max_new_tokens": 0}, "a whole number from 1 up"),
        ({"seed": -1}, "from 0 up"),
        ({"patch": {"budget": -3}}, "budget=-3 is not allowed"),
        ({"generate": {"temprature": 1}}, "'temprature': 1} is not allowed"),
        ({"generate": {"num_return_sequences": 2}}, "num_return_sequences"),
        ({"generate": {"top_k": object()}}, "only numbers"),
    ],
)
def test_settings_are_checked_at_once(options, told):
    with pytest.raises(ConfigError, match=told):
        Settings(**options)


def test_settings_are_plain_data():
    said = Settings(patch={"dense_layers": (0, 1)}, generate={"top_k": 5}).as_json()
    assert said["patch.dense_layers"] == [0, 1] and said["generate.top_k"] == 5 and json.dumps(said)
