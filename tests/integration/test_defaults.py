"""Torch's default dtype and device are the user's, or for a moment a loading thread's: nothing may follow them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading

import pytest
import torch

import scout_hf
from tests.integration.common import EXACT_METHODS, LOSSY, assert_equal, left_padded, llama, prompt, run

ONE_TIER = {"budget": 0.4, "block_size": 8, "window": 8, "split": "off"}
SPLIT = LOSSY | {"budget": 0.4}
TIERS = {"budget": 0.5, "block_size": 8, "window": 8}
SETTINGS = {
    "one tier": ONE_TIER,
    "one tier, all of it": {"budget": None, "block_size": 8, "split": "off"},
    "two tiers": SPLIT,
    "two tiers, real query": SPLIT | {"cpu_query": "real"},
    "two tiers, trusted query": SPLIT | {"cpu_query": "auto"},
    "two tiers, own recall": SPLIT | {"recall": 0.2},
    "two tiers, no prediction": SPLIT | {"layer_ahead": False},
    "monitor": ONE_TIER | {"monitor": True},
    "monitor, all": SPLIT | {"monitor": 1.0},
    "int8": ONE_TIER | {"host_dtype": "int8"},
    "int8, two tiers": SPLIT | {"host_dtype": "int8"},
    "torch": ONE_TIER | {"cpu_backend": "torch", "monitor": 1.0},
    "torch, two tiers": SPLIT | {"cpu_backend": "torch"},
    **{digest: ONE_TIER | {"digest": digest} for digest in ("minmax", "minmax-int8", "minmax-sub", "sign", "sign2")},
    "hgca": TIERS | {"method": "hgca", "resident": 16},
    "infinigen": TIERS | {"method": "infinigen"},
    "infinigen, kept": TIERS | {"method": "infinigen", "method_options": {"keep": True, "alpha": None}},
    **EXACT_METHODS,
}
INPUTS = {"one row": prompt(tokens=67), "padded": left_padded(0, 23, tokens=67)}
DEFAULTS = {"bfloat16": (torch.bfloat16, None), "float64": (torch.float64, None), "meta": (torch.float32, "meta")}


@contextlib.contextmanager
def defaults(dtype: torch.dtype, device: str | None):
    """Torch's defaults for a while."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def outcome(model, settings, inputs):
    """The last run's output, the first one's, and the tallies without what depends on the time: two turns, one fork."""
    if isinstance(inputs, torch.Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    with scout_hf.patch(model, **settings) as handle:
        first = run(model, inputs, new=6)
        cache = first.past_key_values
        cache.crop(-9)
        cache.batch_repeat_interleave(2)
        cache.fork().batch_select_indices(torch.ones(2, dtype=torch.int64, device="cpu"))
        ids = first.sequences.repeat_interleave(2, dim=0)
        seen = inputs["attention_mask"].repeat_interleave(2, dim=0)
        more = torch.ones_like(ids[:, seen.shape[1] :])
        again = {"input_ids": ids, "attention_mask": torch.cat([seen, more], dim=1)}
        last = run(model, again, new=3, past_key_values=cache)
        stats = handle.stats()
    told = [(part.context_tokens, part.attended_tokens, part.cpu_ratio, part.cosine) for part in (stats, *stats.layers)]
    lost = [part.fidelity and dataclasses.replace(part.fidelity, cost_ms=0) for part in (stats, *stats.layers)]
    # The monitor's jobs keep pages for as long as they take.
    held = None if settings.get("monitor") else stats.kv_bytes
    return last, first, (told, lost, stats.recalled_bytes, held)


def assert_same(found, expected):
    assert_equal(found[1], expected[1])
    assert_equal(found[0], expected[0])
    assert found[2] == expected[2]


@pytest.fixture(scope="module")
def model():
    return llama()


@functools.cache
def under_float32(name: str, inputs: str):
    return outcome(llama(), SETTINGS[name], INPUTS[inputs])


# Without padding the masks, and what is made for them, are gone.
UNPADDED = ["one tier", "two tiers, trusted query", "torch, two tiers", "hgca", "infinigen"]
CASES = [(name, "padded") for name in SETTINGS] + [(name, "one row") for name in UNPADDED]


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("name, inputs", CASES)
@pytest.mark.thin(2)
def test_generation_does_not_follow_torchs_defaults(model, name, inputs, default):
    expected = under_float32(name, inputs)
    with defaults(*DEFAULTS[default]):
        assert_same(outcome(model, SETTINGS[name], INPUTS[inputs]), expected)


@pytest.mark.parametrize("name", ["monitor, all", "monitor"])
def test_a_thread_that_changes_the_default_dtype_all_the_time(model, name):
    """As from_pretrained does while it makes a model; torch has one default for all threads."""
    expected = under_float32(name, "padded")
    over, changes = threading.Event(), 0

    def change():
        nonlocal changes
        while not over.is_set():
            for dtype in (torch.bfloat16, torch.float64, torch.float32):
                torch.set_default_dtype(dtype)
                changes += 1

    thread, interval = threading.Thread(target=change), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        for _ in range(2):
            assert_same(outcome(model, SETTINGS[name], INPUTS["padded"]), expected)
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(interval)
        torch.set_default_dtype(torch.float32)
    assert changes > 100
