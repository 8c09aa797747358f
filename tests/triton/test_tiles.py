"""The file of measured tiles: a cache, which may be missing, broken or out of reach, and never in the way."""

import json
import os
import pwd
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from scout_hf.kernels.triton import tuning  # noqa: E402
from scout_hf.kernels.triton.tuning import Tile  # noqa: E402

KEY = "interpreter, a key of this test"
SIZES = {"tokens": 32, "warps": 4, "stages": 2, "prefetch": 0, "ahead": 4}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Where the file belongs; what was read before is forgotten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()
    path = tmp_path / "scout_hf" / "tiles.json"
    path.parent.mkdir()
    yield path
    monkeypatch.undo()
    tuning.forget()


def held(**changed):
    sizes = {name: value for name, value in {**SIZES, **changed}.items() if value != "absent"}
    return json.dumps({"format": tuning.FORMAT, "tiles": {KEY: sizes}})


def test_what_was_kept_is_read(cache):
    cache.write_text(held())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning._table() == {KEY: Tile(32, 4, 2)}


BROKEN = {
    "nothing": "",
    "half": held()[:40],
    "a list": "[]",
    "another format": held().replace("tiles/1", "tiles/2"),
    "no tiles": json.dumps({"format": tuning.FORMAT}),
    "tiles are a list": json.dumps({"format": tuning.FORMAT, "tiles": [1]}),
    "a tile is a number": json.dumps({"format": tuning.FORMAT, "tiles": {KEY: 5}}),
    "nested": json.dumps({"format": tuning.FORMAT, "tiles": {}})[:-2] + '{"a":' * 5000 + "1" + "}" * 5002,
    "nested far": "[" * 200_000,
    "large": json.dumps({"format": tuning.FORMAT, "tiles": {"x" * (2 << 20): SIZES}}),
    "no power of two": held(tokens=48),
    "tokens beyond all memory": held(tokens=1 << 30),
    "tokens as text": held(tokens="64"),
    "tokens as a fraction": held(tokens=64.0),
    "true warps": held(warps=True),
    "no warps": held(warps=0),
    "no stages": held(stages=0),
    "a thousand stages": held(stages=1000),
    "an unknown prefetch": held(prefetch=3),
    "behind": held(ahead=-1),
    "a list of sizes": held(tokens=[64]),
    "a size too few": held(ahead="absent"),
    "a size too many": held(colour=1),
    "not a number": held(ahead=float("nan")),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_ignored_with_one_warning_and_replaced_by_the_next_measurement(cache, monkeypatch, kind):
    cache.write_text(BROKEN[kind])
    query, keys = torch.zeros(1, 4, 1, 64), torch.zeros(1, 2, 3, 16, 64)
    with pytest.warns(UserWarning) as told:
        assert tuning.tile_for(query, keys) == tuning.tile_for(query, keys[..., :8, :]) == Tile()
    assert len(told) == 1 and str(cache) in str(told[0].message) and "bench gpu" in str(told[0].message)
    monkeypatch.setattr(tuning.triton.testing, "do_bench", lambda run, **_: run())
    tuning.tune(query, keys, lambda tile: float(tile.tokens), (Tile(32), Tile(64)))
    tuning.forget()
    assert tuning.tile_for(query, keys) == Tile(32) and [one.name for one in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize("home", [None, "/nowhere/at/all", "/proc"])
def test_without_a_home_that_can_be_written_to_tiles_are_measured_again(monkeypatch, home):
    def nobody(number):
        raise KeyError(f"uid not found: {number}")

    # As in a container that runs under a number without an entry in /etc/passwd.
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    if home:
        monkeypatch.setenv("HOME", home)
    # Root makes a folder anywhere but in /proc.
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError("not here")))
    tuning.forget()
    try:
        query, keys = torch.zeros(1, 4, 1, 64), torch.zeros(1, 2, 3, 16, 64)
        monkeypatch.setattr(tuning.triton.testing, "do_bench", lambda run, **_: run())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert tuning.tile_for(query, keys) == Tile()
            tuning.tune(query, keys, lambda tile: float(tile.tokens), (Tile(32), Tile(64)))
            assert tuning.tile_for(query, keys) == Tile(32)
    finally:
        monkeypatch.undo()
        tuning.forget()


def test_a_relative_cache_folder_is_ignored_as_its_standard_says(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert tuning._file() == tmp_path / "home" / ".cache" / "scout_hf" / "tiles.json"
    assert os.listdir(tmp_path) == []
