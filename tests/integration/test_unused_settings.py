"""Settings without effect are named once, when a model is patched; each method uses what it declares."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path

import pytest
import torch

import scout_hf
from scout_hf import RecallIntervals, ScoutConfig
from scout_hf.auto_draft import AutoDraft
from scout_hf.methods import Method, method_names, unused_settings
from scout_hf.methods.base import find_method
from scout_hf.methods.offloading import SCOUTS_OWN
from scout_hf.methods.unused import ALWAYS
from tests.integration.common import llama, prompt, run

CPU = torch.device("cpu")
BUILT_IN = ("scout", "dense", "kvpr", "infinigen", "hgca")
CHANGED = {
    "budget": 64,
    "mass": 0.9,
    "block_size": 16,
    "sinks": 8,
    "window": 8,
    "dense_layers": 1,
    "digest": "sign",
    "split": "cpu",
    "layer_ahead": False,
    "cpu_query": "predicted",
    "recall": 0.5,
    "resident": 64,
    "threads": 1,
    "spin_us": 50,
    "host_dtype": "int8",
    "host_memory": "8MiB",
    "spill_dir": "/var/tmp",
    "cpu_backend": "torch",
    "gpu_kernels": "torch",
    "hand_over": "join",
    "link_gbps": 5.0,
    "cpu_gbps": 5.0,
    "monitor": True,
}
ROOMS = ("scout_hf/methods/", "scout_hf/selection/")
NOT_A_USE = ("check", "is_exact", "used_settings", "has_two_tiers")


def used(method, **settings):
    return find_method(method).used_settings(ScoutConfig(method=method, **settings), CPU)


def warned(patching):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = patching()
    return result, [warning for warning in found if "no effect" in str(warning.message)]


def test_every_setting_is_declared_by_a_method():
    """A new field that no method declares would be called useless wherever it is set."""
    fields = {field.name for field in dataclasses.fields(ScoutConfig)}
    assert set(CHANGED) == fields - ALWAYS
    declared = set().union(*(used(method, split="cpu") for method in BUILT_IN)) | {"hand_over"}
    assert declared == fields - ALWAYS


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("method", BUILT_IN)
def test_a_setting_without_effect_is_named_once(method, name):
    """Scout's own settings are refused by the other methods."""
    if method != "scout" and name in SCOUTS_OWN and name not in find_method(method).uses_in_drafts:
        pytest.skip("refused")
    handle, found = warned(lambda: scout_hf.patch(llama(), method=method, **{name: CHANGED[name]}))
    handle.remove()
    assert len(found) == (name not in used(method, **{name: CHANGED[name]}))
    for warning in found:
        assert f"{name}={CHANGED[name]!r} has no effect" in str(warning.message)
        assert warning.filename == __file__


@pytest.mark.parametrize("method", method_names())
def test_defaults_are_never_named(method):
    handle, found = warned(lambda: scout_hf.patch(llama(), method=method))
    handle.remove()
    assert found == []


def test_the_warning_says_what_to_do():
    _, (warning,) = warned(lambda: scout_hf.patch(llama(), resident=64, threads=1))
    assert str(warning.message) == (
        "resident=64, threads=1 have no effect with method='scout', split='auto' and a model on 'cpu': leave them out, "
        "or set split='cpu', which uses them"
    )
    _, (warning,) = warned(lambda: scout_hf.patch(llama(), method="dense", budget=64))
    assert str(warning.message).endswith(
        "or set draft=True or method='hgca' or method='infinigen' or method='scout', which uses it"
    )


def test_one_tier_does_what_is_asked_for():
    handle, found = warned(lambda: scout_hf.patch(llama(), layer_ahead=False, cpu_query="real", recall=None))
    handle.remove()
    assert found == []


def test_a_cache_s_own_settings_are_named():
    with scout_hf.patch(llama(), method="dense") as handle:
        assert warned(handle.new_cache)[1] == []
        assert "budget=64 has no effect" in str(warned(lambda: handle.new_cache(budget=64))[1][0].message)


def test_a_warning_that_is_an_error_leaves_the_model_unpatched():
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="no effect"):
            scout_hf.patch(model, method="dense", budget=64)
    scout_hf.patch(model).remove()


@pytest.mark.parametrize("name", ["budget", "mass", "sinks", "dense_layers", "digest", "cpu_gbps"])
@pytest.mark.parametrize("draft", [True, None])
@pytest.mark.parametrize("method", ["dense", "kvpr"])
def test_settings_of_drafts_have_an_effect_with_drafts_alone(method, draft, name):
    """A cache's own settings too."""
    options = {"method": method, name: CHANGED[name]}
    handle, found = warned(lambda: scout_hf.patch(llama(), draft=draft, **options))
    _, of_cache = warned(lambda: handle.new_cache(**{name: CHANGED[name]}))
    handle.remove()
    assert len(found) == len(of_cache) == (draft is None)
    assert all("set draft=True or " in str(warning.message) for warning in found)
    assert unused_settings(ScoutConfig(**options), CPU, drafting=bool(draft)) == ([] if draft else [name])


def test_a_method_that_declares_nothing_is_not_warned_about(monkeypatch):
    assert Method.uses is None
    monkeypatch.setattr(find_method("dense"), "uses", None)
    assert unused_settings(ScoutConfig(method="dense", budget=64), CPU) == []


# -- what is declared is what is read -----------------------------------------------------------------------------

# Read where a model is patched, or by the stores: not in the rooms that are watched.
READ_ELSEWHERE = {"threads", "spin_us", "cpu_backend", "monitor", "split", "block_size", "host_memory", "spill_dir"}
# Read without effect: methods other than scout refuse host_dtype; hgca's window goes by its other settings.
IN_VAIN = {"hgca": {"host_dtype", "window"}, **{name: {"host_dtype"} for name in ("dense", "kvpr", "infinigen")}}
for name in ("dense", "kvpr"):
    IN_VAIN[name].add("gpu_kernels")  # drafts select on the CPU


@pytest.mark.parametrize(
    "method, settings",
    [("scout", {"split": "off"}), ("scout", {"split": "cpu", "resident": 16, "recall": 0.01})]
    + [(method, {"split": "cpu"}) for method in BUILT_IN[1:]]
    + [(method, {"split": "cpu", "draft": True}) for method in ("dense", "kvpr")],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_method_reads_the_settings_that_it_declares(method, settings, monkeypatch):
    read, plain = set(), object.__getattribute__

    def noted(config, name):
        if name in CHANGED:
            frame = sys._getframe(1)
            while Path(frame.f_code.co_filename).name == "config.py" or frame.f_code is noted.__code__:
                frame = frame.f_back
            if any(room in frame.f_code.co_filename for room in ROOMS) and frame.f_code.co_name not in NOT_A_USE:
                read.add(name)
        return plain(config, name)

    settings = dict(settings)
    drafting = settings.pop("draft", None)
    options = {"block_size": 8, **settings} | ({"budget": 64} if "budget" in used(method) or drafting else {})
    with scout_hf.patch(llama(), method=method, draft=drafting, **options) as handle:
        monkeypatch.setattr(AutoDraft, "length", lambda pace, most: max(0, most))
        monkeypatch.setattr(ScoutConfig, "__getattribute__", noted)
        run(handle.model, {"input_ids": prompt(tokens=131)}, new=8)
        monkeypatch.undo()
        declared = find_method(method).used_settings(handle.config, CPU)
        if drafting:
            declared |= find_method(method).uses_in_drafts
    assert declared - READ_ELSEWHERE == read - READ_ELSEWHERE - IN_VAIN.get(method, set())


def test_a_recall_profile_is_a_setting_like_others():
    profile = RecallIntervals((1, 1), 0.12, "llama")
    assert unused_settings(ScoutConfig(recall=profile, split="off"), CPU) == ["recall"]
