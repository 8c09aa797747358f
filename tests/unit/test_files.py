"""Files that are whole or not there, whoever planted what beside them, and JSON that is checked when it is read."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from scout_hf import ConfigError, RecallIntervals
from scout_hf.files import read_json, whole_file, whole_folder, write_text
from scout_hf.planner import MACHINES
from scout_hf.rules import anything

PROFILE = RecallIntervals((3, 0, 12), 0.12, "llama")


# -- writing --------------------------------------------------------------------------------------------------------


def test_text_and_bytes_arrive_as_they_are(tmp_path):
    write_text(tmp_path / "a", "ü\n\r\n")
    assert (tmp_path / "a").read_bytes() == "ü\n\r\n".encode()
    with whole_file(tmp_path / "b", binary=True) as file:
        file.write(bytes(range(256)))
    assert (tmp_path / "b").read_bytes() == bytes(range(256))
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("moment", ["begun", "written", "synced", "renamed"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error, moment):
    target = tmp_path / "kept"
    target.write_text("old")

    def fail(*_):
        raise error

    if moment in ("synced", "renamed"):
        monkeypatch.setattr(os, {"synced": "fsync", "renamed": "replace"}[moment], fail)
    with pytest.raises(error), whole_file(target) as file:
        if moment == "begun":
            fail()
        file.write("new" * 10000)
        if moment == "written":
            fail()
    monkeypatch.undo()
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["kept"]


def test_the_first_write_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), whole_file(tmp_path / "never") as file:
        file.write("half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_is_whole_or_not_there(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with whole_folder(target) as folder:
        (folder / "below").mkdir()
        (folder / "below" / "file").write_bytes(b"all")
        assert not target.exists()
    assert (target / "below" / "file").read_bytes() == b"all" and [target] == list(tmp_path.iterdir())
    with pytest.raises(OSError), whole_folder(target) as folder:
        (folder / "other").touch()
    assert [target] == list(tmp_path.iterdir()) and not (target / "other").exists()


def test_a_new_file_gets_the_usual_permissions_and_an_old_one_keeps_its_own(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    finally:
        os.umask(before)
    for mode in (0o600, 0o664):
        (tmp_path / "new").chmod(mode)
        write_text(tmp_path / "new", "again")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == mode


def test_scratch_names_cannot_be_known_and_are_never_reused(tmp_path, monkeypatch):
    opened, real = [], os.open

    def spy(path, flags, *rest):
        if flags & os.O_CREAT:
            opened.append(Path(path).name)
            assert flags & os.O_EXCL
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", spy)
    for _ in range(3):
        write_text(tmp_path / ("n" * 250), "")
    assert len(set(opened)) == 3 and os.listdir(tmp_path) == ["n" * 250]


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path):
    texts = [str(number) * 20000 for number in range(8)]
    threads = [threading.Thread(target=write_text, args=(tmp_path / "one", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "one").read_text() in texts and os.listdir(tmp_path) == ["one"]


def test_a_link_in_the_place_of_the_file_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out").symlink_to(tmp_path / "victim")
    write_text(tmp_path / "out", "theirs")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "out").read_text() == "theirs" and not (tmp_path / "out").is_symlink()


def test_a_folder_that_is_missing_is_told_by_the_name_that_was_given(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "no" / "file.json", "")
    assert caught.value.filename == str(tmp_path / "no" / "file.json")


# Every place in which a file of the project's own is written, by what it is called with.
WRITERS = {
    "recall": lambda path: PROFILE.save(path),
    "machine": lambda path: MACHINES["h100"].save(path),
    "timeline": lambda path: _timeline(path),
    "methods": lambda path: _eval("records").write_record({"cells": []}, path),
    "report": lambda path: _report(path),
    "tables": lambda path: _tables(path),
}


def _eval(name):
    import importlib

    return importlib.import_module(f"scout_hf.eval.{name}")


def _timeline(path):
    from scout_hf.trace_files import write

    write([], path)


def _report(path):
    results = Path(__file__).parents[2] / "eval" / "results" / "cpu_kernel.json"
    _eval("report.page").write([results], path)


def _tables(path):
    markdown = _eval("markdown")
    path.write_text(f"{markdown.begin_mark('x')}\n{markdown.end_mark('x')}\n")
    assert markdown.update(path, "x", "made")


@pytest.mark.parametrize("kind", WRITERS)
def test_links_planted_under_names_that_can_be_guessed_are_not_followed(tmp_path, kind):
    victim, place = tmp_path / "victim", tmp_path / "place"
    victim.write_text("mine")
    place.mkdir()
    target, process = place / "out.json", f"{os.getpid()}-{threading.get_ident()}"
    guesses = ("out.json.part", "out.part", ".out.json.part", "out.json.tmp", f"out.json.{os.getpid()}.part")
    for guess in (*guesses, f".out.json.{process}.part"):
        (place / guess).symlink_to(victim)
    there = set(os.listdir(place))
    WRITERS[kind](target)
    assert victim.read_text() == "mine" and set(os.listdir(place)) == there | {"out.json"}
    assert target.stat().st_size > 0


# -- reading --------------------------------------------------------------------------------------------------------

BAD = {
    "empty": b"",
    "half": b'{"a": ',
    "not text": b"\xff\xfe{}",
    "nested": b'{"a":' * 200 + b"1" + b"}" * 200,
    "nested far beyond what Python can recurse": b"[" * 10**6,
    "not a number": b'{"a": NaN}',
    "infinite": b'{"a": -Infinity}',
    "infinite in digits": b'{"a": 1e999}',
    "absurd": b'{"a": 1e300}',
    "ten thousand digits": b'{"a": ' + b"7" * 10000 + b"}",
    "large": b'{"a": "' + b"x" * 5000 + b'"}',
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_bounded_json_is_refused_by_name_and_with_a_remedy(tmp_path, kind):
    path = tmp_path / "some.json"
    path.write_bytes(BAD[kind])
    with pytest.raises(ConfigError, match=r"some\.json cannot be used: .*; try another") as caught:
        read_json(path, anything, "try another", largest_bytes=4000 if kind == "large" else 2 << 20)
    assert len(str(caught.value)) < 400


def test_brackets_inside_of_strings_are_no_nesting(tmp_path):
    held = {"a": "[{" * 1000 + '"\\' + "[" * 1000, "b\\": ["\\"]}
    (tmp_path / "some.json").write_text(json.dumps(held))
    assert read_json(tmp_path / "some.json", anything, "") == held


def test_no_file_a_folder_a_pipe_and_a_file_that_is_not_ours_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*is missing; try another") as caught:
        read_json(tmp_path / "nowhere", anything, "try another")
    assert isinstance(caught.value, ConfigError)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_json(tmp_path, anything, "try another")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ConfigError, match="not a regular file"):
            read_json(tmp_path / "pipe", anything, "try another")
    if hasattr(os, "geteuid") and os.geteuid():
        (tmp_path / "locked").write_text("{}")
        (tmp_path / "locked").chmod(0)
        with pytest.raises(ConfigError, match="cannot be read: Permission"):
            read_json(tmp_path / "locked", anything, "try another")
