"""Recall profiles: made from ratios, saved, loaded, and refused where they do not belong."""

from __future__ import annotations

import json

import pytest

from scout_hf import ConfigError, RecallIntervals
from scout_hf.methods.scout.recall_policy import RecallPolicy
from scout_hf.recall_intervals import intervals_below

PROFILE = RecallIntervals((3, 0, 12), 0.12, "llama", budget=0.25, block_size=16)


def test_saving_and_loading_gives_the_same(tmp_path):
    for budget in (None, 2048, 0.25):
        profile = RecallIntervals([1, 2], 0.5, "qwen3", budget, 64)
        profile.save(tmp_path / "profile.json")
        assert RecallIntervals.load(str(tmp_path / "profile.json")) == profile
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_a_profile_is_frozen_and_usable_as_a_key():
    assert hash(PROFILE) == hash(RecallIntervals([3, 0, 12], 0.12, "llama", 0.25, 16))
    with pytest.raises(AttributeError):
        PROFILE.intervals = (1,)


@pytest.mark.parametrize("moment", ["while writing", "before the swap"])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, moment):
    target = tmp_path / "profile.json"
    PROFILE.save(target)
    name = {"while writing": "os.fsync", "before the swap": "os.replace"}[moment]
    monkeypatch.setattr(name, lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        RecallIntervals((9, 9, 9), 0.5, "llama").save(target)
    monkeypatch.undo()
    assert RecallIntervals.load(target) == PROFILE and [one.name for one in tmp_path.iterdir()] == [target.name]
    RecallIntervals((9, 9, 9), 0.5, "llama").save(target)
    assert RecallIntervals.load(target).intervals == (9, 9, 9)


def changed(**fields):
    data = {"format": "scout_hf.recall_intervals/1", "intervals": [1], "threshold": 0.1, "model_type": "llama"}
    return json.dumps({k: v for k, v in {**data, **fields}.items() if v != "absent"})


WRONG_FILES = {
    "empty": "",
    "half": changed()[:30],
    "not an object": "[1, 2, 3]",
    "a number": "7",
    "another format": changed(format="scout_hf.recall_intervals/2"),
    "no format": changed(format="absent"),
    "no intervals": changed(intervals="absent"),
    "a field too many": changed(colour="red"),
    "text as intervals": changed(intervals="12"),
    "negative": changed(intervals=[3, -1]),
    "fractions": changed(intervals=[1.5]),
    "bools": changed(intervals=[True]),
    "none at all": changed(intervals=[]),
    "threshold as text": changed(threshold="high"),
    "threshold out of range": changed(threshold=7.0),
    "threshold is no number": changed(threshold=float("nan")),
    "absurd": changed(intervals=[10**30]),
    "a million layers": changed(intervals=[1] * 10**6),
    "a model type that is a number": changed(model_type=7),
    "budget as text": changed(budget="all"),
    "budget below zero": changed(budget=-5),
    "blocks of no tokens": changed(block_size=0),
    "nested far": "[" * 200_000,
    "nested in a field": changed(colour="x").replace('"x"', '{"a":' * 900 + "1" + "}" * 900),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_file_that_is_no_profile_is_refused_by_name(tmp_path, kind):
    target = tmp_path / "some_file.json"
    target.write_text(WRONG_FILES[kind])
    with pytest.raises(ConfigError, match=r"some_file\.json.*handle\.profile_recall"):
        RecallIntervals.load(target)


def test_binary_rubbish_is_refused_too(tmp_path):
    (tmp_path / "some_file").write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match="some_file"):
        RecallIntervals.load(tmp_path / "some_file")


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        RecallIntervals.load(tmp_path / "nowhere.json")


def test_another_model_is_refused_with_both_named():
    PROFILE.check("llama", 3)
    for model_type, layers in (("mistral", 3), ("llama", 2), ("llama", 4)):
        with pytest.raises(ConfigError) as caught:
            PROFILE.check(model_type, layers)
        message = str(caught.value)
        assert "'llama'" in message and "3 layers" in message and repr(model_type) in message and str(layers) in message


def test_intervals_keep_the_share_below_the_threshold():
    ratios = [
        [0.05, 0.08, 0.11, 0.12, 0.30],  # three steps below: recall after the third
        [0.01] * 5,  # never
        [0.50, 0.50],  # at once: every step
        [0.05, 0.20, 0.05, 0.05],  # the first time counts
        [],
    ]
    assert intervals_below(0.12, ratios) == (3, 0, 1, 1, 0)


def due(rule, layer: int, steps: int) -> list[int]:
    """The steps in which a layer recalls, from 1."""
    policy = RecallPolicy(rule, layer)
    return [step for step in range(1, steps + 1) if policy.next(100 + step) is not None]


def test_layers_recall_at_intervals_of_their_own_and_not_all_at_once():
    assert [due(3, layer, 9) for layer in range(3)] == [[3, 6, 9], [2, 5, 8], [1, 4, 7]]
    assert [due(PROFILE, layer, 24) for layer in range(3)] == [due(3, 0, 24), [], due(12, 2, 24)]
    assert due(None, 0, 9) == []


def test_a_share_is_lower_and_higher_by_turns():
    one, other = RecallPolicy(0.5, 0), RecallPolicy(0.5, 1)
    assert [one.next(tokens) for tokens in range(4)] == [0.625, 0.375, 0.625, 0.375]
    assert [other.next(tokens) for tokens in range(4)] == [0.375, 0.625, 0.375, 0.625]


def test_what_an_interval_does_not_ask_is_how_much_the_cpu_has():
    assert RecallPolicy(1, 0).next(100) == 0.0
