"""`scout-hf session`: what is kept on disk is listed, looked into, checked and removed, and nothing else is."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import scout_hf
from scout_hf import CACHE, PrefixStore
from scout_hf.cli import app
from scout_hf.eval.ask.texts import texts_in
from scout_hf.eval.kept import command
from scout_hf.eval.kept.options import Rm
from scout_hf.eval.pocket import WEIGHTS, load_pocket, make_document

MODEL = WEIGHTS / "llama"
BLOCK = 16
WORDS = make_document(tokens=500, facts=4, seed=0).text.split()
ONE, TWO = " ".join(WORDS[:200]), " ".join(WORDS[:80] + WORDS[200:330])
"""Two texts that begin alike."""


def call(*words, asked=None):
    return CliRunner().invoke(app, [str(word) for word in words], input=asked)


def told(done, code=0):
    """What a command that ended so wrote and told."""
    assert done.exit_code == code, (done.output, done.exception)
    return done.stdout, done.stderr


def listed(*words):
    return json.loads(told(call("session", "ls", *words, "--json"))[0])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two texts in a store, and something that generate() read there."""
    monkeypatch.setenv("SCOUT_HF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text(ONE)
    Path("two.txt").write_text(TWO)
    for name in ("one.txt", "two.txt"):
        told(call("read", MODEL, name, "--store", "st", "--plain", "--set", f"block_size={BLOCK}"))
    return tmp_path


@pytest.fixture
def session(place):
    """A saved session of 100 tokens."""
    model, tokenizer = load_pocket()
    ids = tokenizer(ONE, return_tensors="pt").input_ids[:, :100]
    with scout_hf.patch(model, block_size=BLOCK) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(ids, **{CACHE: cache}, logits_to_keep=1)
        cache.save("kept/one.kv")
    return place / "kept" / "one.kv"


@pytest.fixture(autouse=True)
def kept_folder(tmp_path):
    (tmp_path / "kept").mkdir()


def test_texts_of_a_store_are_listed(place):
    two, one = listed("--store", "st")
    assert (one["name"], two["name"]) == ("one.txt", "two.txt") and one["what"] == two["what"] == "text"
    assert one["kept"] == one["tokens"] // BLOCK * BLOCK > 190 and one["model"] == "llama"
    assert one["made"]["scout_hf"] and one["used"] > time.time() - 100 and one["problem"] is None
    assert set(one["folders"]) & set(two["folders"])  # what they share
    out, _ = told(call("session", "ls", "--store", "st"))
    assert all(name in out for name in ("one.txt", "two.txt", "all together", f"{one['kept']} of {one['tokens']}"))
    assert len(out.splitlines()) < 12
    assert out.count(f"llama {one['weights'][:8]}") == 2 and one["weights"] == two["weights"]


def test_two_models_of_one_type_are_told_apart(session):
    model, _ = load_pocket()
    with torch.no_grad():
        model.lm_head.weight += 1.0
        with scout_hf.patch(model) as handle:
            cache = handle.new_cache()
            model(torch.ones(1, 8, dtype=torch.long), **{CACHE: cache})
            cache.save("kept/two.kv")
    one, two = listed("kept")
    assert one["model"] == two["model"] == "llama" and one["weights"][:8] != two["weights"][:8]
    out, _ = told(call("session", "ls", "kept"))
    assert all(f"llama {each['weights'][:8]}" in out for each in (one, two))


def test_prompts_that_no_text_is_of_are_one_line(place):
    model, tokenizer = load_pocket()
    ids = tokenizer(" ".join(WORDS[330:]), return_tensors="pt").input_ids
    with scout_hf.patch(model, store="st"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
    *_, others = listed("--store", "st")
    assert (others["what"], others["name"], others["tokens"]) == ("other prompts", "1 segment", ids.shape[1] // 32 * 32)


def test_sessions_are_listed_by_their_path_and_by_their_folder(session):
    (one,) = listed(session)
    assert (one["what"], one["tokens"], one["model"]) == ("session", 100, "llama")
    assert one["size"] == sum(file.stat().st_size for file in session.iterdir())
    assert listed("kept") == [one | {"name": "kept/one.kv", "folders": ["kept/one.kv"]}]
    assert [entry["what"] for entry in listed("kept", "st")] == ["session", "text", "text"]
    assert [entry["what"] for entry in listed(session, "--store", "st")] == ["session", "text", "text"]


def test_everything_about_a_session(session):
    out, _ = told(call("session", "info", session, "--tokenizer", MODEL, "--check"))
    assert "model           llama" in out and f"begins          {' '.join(WORDS[:8])}" in out
    assert "damaged         nothing: all of it was read" in out and "block_size=16" in out and "transformers=" in out
    said = json.loads(told(call("session", "info", session, "--json"))[0])
    assert (said["tokens"], said["rows"], said["token_ids"]) == (100, 1, "known") and "begins" not in said


def test_everything_about_a_text_and_a_store(place):
    said = json.loads(told(call("session", "info", "two.txt", "--store", "st", "--json", "--tokenizer", MODEL))[0])
    assert said["read_with"] == str(MODEL) and said["settings"] == [f"block_size={BLOCK}"] and said["plain"]
    assert said["dtype"] == "float32" and said["begins"].endswith(" ...")
    out, _ = told(call("session", "info", "st", "--check"))
    assert "texts           two.txt\n                one.txt\nsegments        2\n" in out and "nothing: all" in out


def spoil(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_damage_is_told(session):
    spoil(session / "pages.safetensors")
    assert listed(session)[0]["problem"] is None  # found by reading all of it alone
    out, _ = told(call("session", "info", session, "--check"), 1)
    assert "damaged         " in out and "is not what was written" in out
    spoil(session / "session.json", 40)
    out, _ = told(call("session", "ls", session))
    assert "damaged" in out and "session.json" in out
    told(call("session", "rm", session, "--yes"))
    assert not session.exists()


def test_damage_in_a_store_is_told(place):
    one = listed("--store", "st")[1]
    spoil(Path(one["folders"][0]) / "pages.safetensors")
    for name in ("one.txt", "st"):
        said = json.loads(told(call("session", "info", name, "--store", "st", "--check", "--json"), 1)[0])
        assert len(said["damaged"]) == 1 and "is not what was written" in said["damaged"][0]
    spoil(Path(one["folders"][0]) / "session.json", 40)
    said = json.loads(told(call("session", "info", "st", "--json"))[0])
    assert said["cannot_be_used"] == [one["folders"][0]]
    # What lay behind it in the other text is there, and cannot be found any more.
    assert [(entry["what"], entry["kept"]) for entry in listed("--store", "st")][:2] == [("text", 0), ("text", 0)]


def test_a_text_is_removed_and_others_keep_what_they_share(place):
    two, one = listed("--store", "st")
    assert not command.rm(Rm(["one.txt"], place / "st"), print, lambda question: "one.txt (" not in question)
    assert len(listed("--store", "st")) == 2
    _, errors = told(call("session", "rm", "one.txt", "--store", "st"), 2)
    assert "There is nobody to ask: say --yes" in errors
    assert told(call("session", "rm", "one.txt", "--store", "st", "--yes"))[0] == "removed one.txt\n"
    (left,) = listed("--store", "st")
    assert left == two
    told(call("session", "rm", "two.txt", "--store", "st", "--yes"))
    assert not listed("--store", "st") and not PrefixStore("st").segments()
    assert "nothing is kept in" in told(call("session", "ls", "--store", "st"))[0]


def test_what_is_no_session_is_not_removed(session):
    Path("kept/notes").mkdir()
    (session / "notes.txt").write_text("mine")
    os.symlink("one.kv", "kept/link")
    wrong = {"kept": "no session, and no text", "one.txt": "its texts are one.txt", "kept/link": "kept/link is a link"}
    wrong |= {str(session): "holds more than a session (notes.txt)", "kept/notes": "no session", "no": "no session"}
    wrong.pop("one.txt")
    for name, expected in wrong.items():
        # All or nothing.
        _, errors = told(call("session", "rm", "one.txt", name, "--store", "st", "--yes"), 2)
        assert expected in errors and errors.count("\n") == 1
    assert len(listed("--store", "st")) == 2 and (session / "notes.txt").exists()


def test_a_store_is_pruned(place):
    before = sum(one.size for one in PrefixStore("st").segments())
    said = json.loads(told(call("session", "prune", "--store", "st", "--json"))[0])
    assert said == {"freed": 0, "size": before, "forgotten": []}
    said = json.loads(told(call("session", "prune", "--store", "st", "--limit", f"{before - 1}B", "--json"))[0])
    assert said["freed"] > 0 and said["freed"] + said["size"] == before and not said["forgotten"]
    out, _ = told(call("session", "prune", "--store", "st", "--limit", "1KB"))
    assert "freed, 0 bytes kept; nothing is left of two.txt, one.txt" in out
    assert not texts_in(PrefixStore("st"))
    assert "--limit x is not allowed" in told(call("session", "prune", "--store", "st", "--limit", "x"), 2)[1]


def test_wrong_places_are_told_and_not_made(place):
    for words in (["ls"], ["prune"], ["ls", "--store", "no"], ["info", "x", "--store", "no"]):
        _, errors = told(call("session", *words), 2)
        assert "there is no store" in errors and "scout-hf read MODEL TEXT makes one" in errors
    assert not Path("no").exists() and not Path("cache").exists()
    wrong = {"no": "no is not there, or no folder", "one.txt": "not there", "kept": "holds no session and is no store"}
    for path, expected in wrong.items():
        _, errors = told(call("session", "ls", path), 2)
        assert expected in errors and "cache.save() or scout-hf read made" in errors
    _, errors = told(call("session", "info", "three.txt", "--store", "st"), 2)
    assert "three.txt is no session, and no text of the store; its texts are one.txt, two.txt" in errors
    _, errors = told(call("session", "info", "one.txt", "--store", "st", "--tokenizer", "./no"), 2)
    assert "./no is not the folder of a model" in errors


def test_a_store_may_lack_files_of_its_texts_or_have_others(place):
    (Path("st/texts") / "half.json").write_text("{")
    (Path("st/texts") / ".x.part").write_text("")
    assert len(listed("--store", "st")) == 2
    for path in Path("st/texts").glob("*.json"):
        path.unlink()
    (others,) = listed("--store", "st")
    assert (others["what"], others["name"]) == ("other prompts", "2 segments")
