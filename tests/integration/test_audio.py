"""Models that hear: prompts with sound, and with images beside it, then decode steps from a ScoutCache."""

import copy

import pytest
import torch
import transformers

import scout_hf
from scout_hf.errors import UnsupportedModelError
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


SPEAKING = {"Qwen2_5Omni": "qwen2_5_omni_thinker", "Qwen3OmniMoe": "qwen3_omni_moe_thinker"}


def silent_model(name: str):
    """A model that thinks and speaks, without the part that speaks."""
    config = getattr(transformers, f"{name}Config")(thinker_config=copy.deepcopy(HEARING[SPEAKING[name]].config))
    config.enable_audio_output = False
    # Of releases that read it off the outer config and do not set it.
    config.initializer_range = 0.02
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


@pytest.mark.parametrize("name", SPEAKING)
def test_a_model_that_also_speaks_names_its_thinker(name):
    model = silent_model(name)
    with pytest.raises(UnsupportedModelError, match=r"patch\(model.thinker\)"):
        scout_hf.patch(model)
    inputs = prompt_with_sound(SPEAKING[name])
    expected = run(model.thinker, inputs, 6)
    with scout_hf.patch(model.thinker, **ONE_TIER) as handle:
        assert_close(run(model.thinker, inputs, 6), expected)
        assert handle.stats().steps == 5


def test_its_own_generate_runs_through_the_patched_thinker():
    """That of Qwen2.5-Omni does not run without the part that speaks, which is large."""
    model = silent_model("Qwen3OmniMoe")
    inputs = prompt_with_sound("qwen3_omni_moe_thinker") | {"return_audio": False, "thinker_max_new_tokens": 6}
    expected = model.generate(**inputs)
    with scout_hf.patch(model.thinker, **ONE_TIER) as handle:
        model.generate(**inputs)
        assert handle.stats().steps == 5
        assert str(model.generate(**inputs)) == str(expected)
