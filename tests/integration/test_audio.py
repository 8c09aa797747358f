"""Models that hear: prompts with sound, and with images beside it, then decode steps from a ScoutCache."""

import pytest
import torch

import scout_hf
from tests.integration.common import LOSSY, ONE_TIER, TWO_TIERS, assert_close, both_tiers_hold_tokens, logits, run
from tests.patches.tiny_hearing import HEARING, missing, prompt_with_sound, tiny_hearing
from tests.patches.tiny_vision import IMAGE

TIERS = {"one tier": ONE_TIER, "two tiers": TWO_TIERS}
EVERY = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.skipif(bool(missing(name)), reason=missing(name))) for name in HEARING],
)


@EVERY
def test_prompts_with_sound_equal_stock(name):
    model, inputs = tiny_hearing(name), prompt_with_sound(name, rows=2, padding=(0, 5))
    expected = run(model, inputs, 6)
    for tiers, settings in TIERS.items():
        with scout_hf.patch(model, **settings) as handle:
            assert_close(run(model, inputs, 6), expected)
            assert handle.stats().steps == 5 and not handle.stats().stock_passes
            assert tiers == "one tier" or both_tiers_hold_tokens(handle)
    with scout_hf.patch(model, **LOSSY) as handle:
        sparse = run(model, inputs, 6)
        assert handle.stats().steps == 5
    assert torch.isfinite(logits(sparse)).all()
    assert (logits(sparse)[0] - logits(expected)[0]).abs().max() <= 3e-6, "the prompt is exact"


@EVERY
def test_the_sound_and_the_image_are_heard_and_seen(name):
    """Else the test above would be one of text."""
    model, inputs = tiny_hearing(name), prompt_with_sound(name)
    expected = logits(run(model, inputs, 1))
    media = ["input_features", *(["pixel_values"] if (inputs["input_ids"] == IMAGE).any() else [])]
    for name_of in media:
        other = logits(run(model, inputs | {name_of: inputs[name_of].flip(0, -1) * 2}, 1))
        assert (other - expected).abs().max() > 1e-3
