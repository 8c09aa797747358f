"""The benchmark of sessions at a tiny size: every number is there, and an arm that does something else is an error."""

import io
import json

import pytest
import torch
from rich.console import Console

from scout_hf.errors import ConfigError
from scout_hf.eval.bench import disk, readme, report, sessions, sessions_walk
from scout_hf.eval.bench.options import Sessions
from scout_hf.eval.records import read_record
from tests.eval.figures import check_numbers
from tests.eval.test_bench import TINY

OPTIONS = Sessions(512, 1024, 0.25, 4, 64, 16, 1, repeat=3, steps=2, layers=2)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sessions, "COPIED_BYTES", 1 << 20)
        found = sessions.run(Sessions(**vars(OPTIONS) | {"folder": tmp_path_factory.mktemp("disk")}), shape=TINY)
    assert not list((tmp_path_factory.getbasetemp() / "disk0").iterdir())
    return found


def test_the_record_is_complete(record):
    json.dumps(record, allow_nan=False)
    check_numbers(record, ("_ms", "gb_per_s", ".n"))
    kv = 512 * record["model"]["kv_bytes_per_token"]
    assert kv <= record["save"]["files"]["pages.safetensors"] < kv + (1 << 16) < 2 * record["save"]["bytes"]
    assert set(record["load"]) == {"bytes", "warm", "cold", "bare warm", "bare cold"}
    assert all(one["n"] == 3 for name, one in record["load"].items() if name != "bytes")
    assert {name: (one["first"]["n"], one["later"]["n"]) for name, one in record["steps"].items()} == {
        "memory": (3, 3),
        "warm": (3, 3),
        "cold": (3, 3),
    }
    limited = record["limited"]
    assert limited["limit_bytes"] * 4 == limited["kv_bytes"] == 2 * kv
    assert all(one["n"] == 6 for one in limited["steps"].values()) and len(limited["steps"]) == 4
    assert limited["steps"]["limit"]["away_bytes"] > 0 == limited["steps"]["memory"]["away_bytes"]
    assert [row["name"] for row in record["targets"]] == [*sessions.NAMED]


def test_it_is_read_back_and_told_in_markdown(record, tmp_path):
    (tmp_path / "sessions.json").write_text(json.dumps(record))
    text = readme.markdown(read_record(tmp_path / "sessions.json", "sessions"))
    assert text.count("\n| ") == 12 and "| open them, cold | " in text
    broken = record | {"save": {"bytes": 1}}
    (tmp_path / "sessions.json").write_text(json.dumps(broken))
    with pytest.raises(ConfigError, match="save"):
        read_record(tmp_path / "sessions.json", "sessions")


def test_targets_hold_or_not(record):
    assert {row["name"]: row["held"] for row in record["targets"]}["load_s"]
    slow = record | {"load": record["load"] | {"warm": {"median_ms": 301.0}}}
    assert not {row["name"]: row["held"] for row in sessions.targets(slow)}["load_s"]
    without = {row["name"] for row in sessions.targets(record | {"limited": None})}
    assert without == {"load_s", "first_over_step", "save_over_bare"}


@pytest.mark.parametrize("part", [{}, {"limited": None}, {"question": None}], ids=["all", "no limit", "no question"])
def test_tables_fit_a_terminal_and_a_plot_is_made(record, part, tmp_path):
    sink = io.StringIO()
    report.show(record | part, Console(file=sink, width=80))
    text = sink.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert ("session, limit, cold" in text) == (record | part)["limited"].__class__.__name__.startswith("dict")
    busy = record | part | {"company": record["company"] | {"cpus_used_by_others": 0.7}}
    report.show(busy, Console(file=sink, width=80))
    assert "NOT QUIET" in sink.getvalue()
    pytest.importorskip("matplotlib")
    report.save(record | part, tmp_path)
    assert (tmp_path / "sessions.png").stat().st_size > 1000


def test_an_arm_that_gives_something_else_is_an_error():
    one, other = (sessions_walk.Walk(given=[torch.zeros(3), torch.full((3,), value)]) for value in (1.0, 2.0))
    sessions_walk.must_be_equal({"a": one, "b": one})
    with pytest.raises(RuntimeError, match="b and a"):
        sessions_walk.must_be_equal({"a": one, "b": other})


def test_a_disk_without_room_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ValueError, match="--folder"):
        disk.check_room(tmp_path, 1 << 60)


def test_what_was_dropped_is_read_from_the_disk_again(tmp_path):
    path = tmp_path / "file"
    disk.write(path, 3 << 20, b"x" * 1000)
    assert path.stat().st_size == 3 << 20
    before = disk.read_bytes()
    assert disk.read([path]) == 3 << 20 and disk.read_bytes() == before
    disk.drop([path])
    disk.read([path])
    if disk.about(tmp_path).get("filesystem") not in ("tmpfs", "overlay"):
        assert disk.read_bytes() - before >= 3 << 20
