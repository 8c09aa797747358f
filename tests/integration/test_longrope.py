"""Models whose angles change at a length, all positions at once: they begin again there, in the same cache."""

import copy
import functools
import inspect

import pytest
import torch

import scout_hf
from scout_hf.cache import ScoutCache
from tests.integration.common import (
    EXACT_METHODS,
    ONE_TIER,
    TWO_TIERS,
    assert_close,
    assert_equal,
    left_padded,
    logits,
    prompt,
    run,
)
from tests.patches.tiny import longrope, tiny_model

EDGE = 40
LONG = longrope(EDGE)
WAYS = {"one tier": ONE_TIER, "two tiers": TWO_TIERS, **EXACT_METHODS}
# Before, on and beyond the edge; and prompts that decoding carries over it.
LENGTHS = (EDGE - 20, EDGE - 5, EDGE - 1, EDGE, EDGE + 1, EDGE + 30)


def phi3():
    return tiny_model("phi3", **LONG)


def crosses(length, new):
    return length <= EDGE < length + new - 1


@functools.cache
def stock_starts_again():
    """Older releases leave the cache out, and go on with one token all the same."""
    model, ids = phi3(), prompt(1, EDGE)
    found = run(model, ids, new=3)
    whole = model(found.sequences[:, :-1], use_cache=False).logits[:, EDGE - 1 :]
    return bool((torch.stack(found.logits, 1)[:, 1:] - whole[:, 1:]).abs().max() < 1e-4)


def expected_of(model, inputs, new, **options):
    """What stock does, or where it does wrong, what it would do without a cache."""
    length = (inputs if isinstance(inputs, torch.Tensor) else inputs["input_ids"]).shape[1]
    if crosses(length, new) and not stock_starts_again():
        options["use_cache"] = False
    return run(model, inputs, new=new, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.thin(3)
def test_equal_to_stock_and_served_by_us(way, length):
    model, ids = phi3(), prompt(2, length)
    expected = expected_of(model, ids, 16)
    with scout_hf.patch(model, **WAYS[way]) as handle:
        got = run(model, ids, new=16)
        assert_close(got, expected, 5e-6)
        assert isinstance(got.past_key_values, ScoutCache)
        assert got.past_key_values.get_seq_length() == length + 15
        # The pass that begins again is one of many tokens.
        assert handle.stats().steps == 15 - crosses(length, 16)


def test_the_angles_do_change():
    model = phi3()
    stretched = run(model, prompt(1, EDGE + 30), new=2)
    model.config.rope_parameters["long_factor"] = [1.0] * 4
    other = tiny_model("phi3", **{**LONG, "rope_parameters": model.config.rope_parameters})
    other.load_state_dict(model.state_dict())
    assert (logits(run(other, prompt(1, EDGE + 30), new=2)) - logits(stretched)).abs().max() > 1e-4


def test_a_sparse_budget_holds_beyond_the_edge():
    with scout_hf.patch(phi3(), budget=16, block_size=8, window=8, dense_layers=()) as handle:
        run(handle.model, prompt(1, 120), new=8)
        stats = handle.stats()
        assert stats.steps == 7 and not stats.exact


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"padding": (9, 0)}], ids=str)
@pytest.mark.parametrize("way", ["one tier", "two tiers"])
def test_modes_over_the_edge(way, mode):
    model = phi3()
    padding = mode.get("padding", (0,))
    inputs, mode = left_padded(*padding, tokens=EDGE - 6), {k: v for k, v in mode.items() if k != "padding"}
    if "prompt_lookup_num_tokens" in mode and not stock_starts_again():
        pytest.skip("this release drafts for a cache that it left out")
    expected = expected_of(model, inputs, 16, **mode)
    with scout_hf.patch(model, **WAYS[way]):
        got = run(model, inputs, new=16, **mode)
        assert torch.equal(got.sequences, expected.sequences)
        assert isinstance(got.past_key_values, ScoutCache)


@pytest.mark.parametrize("way", ["one tier", "two tiers"])
def test_a_next_turn_over_the_edge(way):
    model, ids = phi3(), prompt(1, EDGE + 12)
    expected = run(model, ids, new=6)
    with scout_hf.patch(model, **WAYS[way]) as handle:
        cache = handle.new_cache()
        run(model, ids[:, : EDGE - 12], new=4, past_key_values=cache)
        assert_close(run(model, ids, new=6, past_key_values=cache), expected)
        assert cache.get_seq_length() == EDGE + 12 + 5


def test_what_the_patch_leaves():
    model = phi3()
    name = "prepare_inputs_for_generation"
    before = inspect.signature(getattr(model, name))
    expected = expected_of(model, prompt(1, EDGE - 3), 8)
    with scout_hf.patch(model):
        assert inspect.signature(getattr(model, name)) == before
        twin = copy.deepcopy(model)
        assert_close(run(twin, prompt(1, EDGE - 3), new=8), expected)
        assert isinstance(run(twin, prompt(1, EDGE - 3), new=8).past_key_values, ScoutCache)
    assert name not in model.__dict__
    assert_equal(expected_of(model, prompt(1, EDGE - 3), 8), expected)
