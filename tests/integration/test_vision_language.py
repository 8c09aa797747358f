"""Models that see: prompts with images, whose tokens may see each other both ways, then decode steps from a ScoutCache.

The prompt goes through the attention and the masks that the model has by itself; what follows is causal.
"""

import inspect
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

import scout_hf
from scout_hf.compat.cache_names import CACHE
from scout_hf.errors import UnsupportedModelError
from tests.integration.common import (
    EXACT_METHODS,
    LOSSY,
    ONE_TIER,
    TWO_TIERS,
    assert_close,
    both_tiers_hold_tokens,
    logits,
    run,
)
from tests.patches.tiny import tiny_config
from tests.patches.tiny_vision import IMAGE, SEEING, VIDEO, missing, prompt_with_images, tiny_seeing

PROMPTS = {
    "padded": {"rows": 2, "padding": (0, 5)},
    "two images": {"images": 2},
    "text": {"images": 0},
}
TIERS = {"one tier": ONE_TIER, "two tiers": TWO_TIERS}


def family(name: str):
    skip = pytest.mark.skipif(bool(missing(name)), reason=missing(name) or "there")
    return pytest.param(name, marks=skip)


def families(*names: str):
    return pytest.mark.parametrize("name", [family(name) for name in names or SEEING])


@cache
def model_of(name: str):
    return tiny_seeing(name)


@cache
def stock_of(name: str, prompt: str):
    """What the model answers unpatched."""
    return run(model_of(name), prompt_with_images(name, **PROMPTS[prompt]), 6)


@pytest.mark.parametrize("tiers", TIERS)
@families()
@pytest.mark.thin(2)
def test_prompts_with_and_without_images_equal_stock(name, tiers):
    for prompt, sizes in PROMPTS.items():
        expected = stock_of(name, prompt)
        with scout_hf.patch(model_of(name), **TIERS[tiers]) as handle:
            assert_close(run(model_of(name), prompt_with_images(name, **sizes), 6), expected)
            assert handle.stats().steps == 5
            assert tiers == "one tier" or both_tiers_hold_tokens(handle)


@families()
def test_a_sparse_budget_runs_with_predicted_queries(name):
    with scout_hf.patch(model_of(name), **LOSSY) as handle:
        sparse = run(model_of(name), prompt_with_images(name, **PROMPTS["padded"]), 6)
        assert handle.stats().steps == 5
    assert torch.isfinite(logits(sparse)).all()
    assert (logits(sparse)[0] - logits(stock_of(name, "padded"))[0]).abs().max() <= 3e-6, "the prompt is exact"


@families("gemma3", "paligemma", "qwen2_5_vl", "idefics3")
def test_beams(name):
    inputs, options = prompt_with_images(name, rows=2, padding=(4, 0)), {"num_beams": 3}
    expected = run(model_of(name), inputs, 6, **options)
    with scout_hf.patch(model_of(name), **TWO_TIERS):
        found = run(model_of(name), inputs, 6, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=3e-6, rtol=0)


@pytest.mark.parametrize("method", EXACT_METHODS)
@families("gemma3", "qwen2_5_vl")
def test_every_method(name, method):
    with scout_hf.patch(model_of(name), **EXACT_METHODS[method]) as handle:
        found = run(model_of(name), prompt_with_images(name, **PROMPTS["two images"]), 6)
        assert handle.stats().steps == 5
    assert_close(found, stock_of(name, "two images"), 1e-5)


@families("gemma3")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_tokens_of_an_image_see_each_other(name, implementation):
    model = tiny_seeing(name)
    model.set_attn_implementation(implementation)
    inputs = prompt_with_images(name)
    expected = run(model, inputs, 4)
    blind = run(model, inputs | {"token_type_ids": torch.zeros_like(inputs["token_type_ids"])}, 4)
    assert (logits(blind) - logits(expected)).abs().max() > 0.01
    with scout_hf.patch(model, **ONE_TIER):
        assert_close(run(model, inputs, 4), expected)


@pytest.mark.parametrize("tiers", TIERS)
@families("gemma3", "paligemma", "idefics3")
def test_prompts_in_chunks(name, tiers):
    """Chunks end within images: their tokens see each other across the passes as far as stock has it."""
    inputs, options = prompt_with_images(name, images=0), {"prefill_chunk_size": 14}
    if SEEING[name].types == "token_type_ids":
        inputs["token_type_ids"][:, 10:20] = 1
    expected = run(model_of(name), inputs, 5, **options)
    with scout_hf.patch(model_of(name), **TIERS[tiers]):
        assert_close(run(model_of(name), inputs, 5, **options), expected)


def two_turns(name: str, kv_cache):
    """A prompt with an image, an answer, and one more of each on top of the same cache."""
    first = prompt_with_images(name)
    said = run(model_of(name), first, 4, **{CACHE: kv_cache}).sequences
    second = prompt_with_images(name, seed=3)
    if types := SEEING[name].types:
        answer = torch.ones_like(said[:, first["input_ids"].shape[1] :]) * (name == "paligemma2")
        second[types] = torch.cat([first[types], answer, second[types]], dim=1)
    second["input_ids"] = torch.cat([said, second["input_ids"]], dim=1)
    second["attention_mask"] = torch.ones_like(second["input_ids"])
    return run(model_of(name), second, 4, **{CACHE: kv_cache})


@pytest.mark.parametrize("tiers", TIERS)
@families("gemma3", "paligemma2", "idefics3", "llava", "hunyuan_vl", "lfm2_vl")
def test_a_next_turn_with_another_image(name, tiers):
    expected = two_turns(name, DynamicCache(config=model_of(name).config.get_text_config()))
    with scout_hf.patch(model_of(name), **TIERS[tiers]) as handle:
        assert_close(two_turns(name, handle.new_cache()), expected)
        assert handle.stats().steps == 6


def grid_turns(name: str, kv_cache):
    """Logits of a second turn with its own image and of two steps after it, at the positions of the conversation.

    The generate() of these models takes either the images of the whole conversation or only new ones: the turn is given
    to the model itself.
    """
    model, images = model_of(name), [prompt_with_images(name, seed=seed) for seed in (1, 3)]
    parts = {key: [one[key] for one in images] for key in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
    whole = {key: torch.cat(both, dim=0 if key == "image_grid_thw" else 1) for key, both in parts.items()}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    takes = inspect.signature(model.model.get_rope_index).parameters
    positions = model.model.get_rope_index(**{key: value for key, value in whole.items() if key in takes})[0]
    last = torch.cat([whole["input_ids"][:, :1]] * 2, dim=1)
    at = positions.max() + 1 + torch.arange(2).expand(*positions.shape[:2], 2)
    if kv_cache is None:
        positions = torch.cat([positions, at], dim=-1)
        ids, mask = torch.cat([whole["input_ids"], last], dim=1), torch.ones(1, 82, dtype=torch.long)
        types = torch.cat([whole["mm_token_type_ids"], torch.zeros_like(last)], dim=1)
        pixels = torch.cat([one["pixel_values"] for one in images])
        given = {"pixel_values": pixels, "image_grid_thw": whole["image_grid_thw"], "mm_token_type_ids": types}
        return model(ids, attention_mask=mask, position_ids=positions, **given).logits[:, 40:]
    found = []
    for turn, one in enumerate(images):
        here = slice(turn * 40, turn * 40 + 40)
        one = one | {"attention_mask": whole["attention_mask"][:, : here.stop]}
        found.append(model(**one, position_ids=positions[..., here], **{CACHE: kv_cache}).logits)
    for step in range(2):
        mask = torch.ones(1, 81 + step, dtype=torch.long)
        given = {"attention_mask": mask, "position_ids": at[..., step : step + 1], CACHE: kv_cache}
        found.append(model(last[:, step : step + 1], **given).logits)
    return torch.cat(found[1:], dim=1)


@torch.no_grad()
@families("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")
def test_a_next_turn_with_another_image_at_the_positions_of_a_grid(name):
    """Against the whole conversation in one pass without a cache, and against a stock cache."""
    whole = grid_turns(name, None)
    stock = grid_turns(name, DynamicCache(config=model_of(name).config.get_text_config()))
    torch.testing.assert_close(stock, whole, atol=3e-6, rtol=0)
    for settings in TIERS.values():
        with scout_hf.patch(model_of(name), **settings) as handle:
            torch.testing.assert_close(grid_turns(name, handle.new_cache()), stock, atol=5e-6, rtol=0)
            assert handle.stats().steps == 2


@families("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
def test_keys_of_images_are_made_again_at_their_places(name, monkeypatch):
    """KVPR tries its arithmetic on the first block, text; the image, whose positions have three axes, comes later."""
    monkeypatch.setattr("scout_hf.methods.kvpr.kvpr.TRIAL_TOKENS", 8)
    options = EXACT_METHODS["kvpr"] | {"method_options": {"share": 1.0}}
    expected = stock_of(name, "padded")
    with scout_hf.patch(model_of(name), **options) as handle:
        assert_close(run(model_of(name), prompt_with_images(name, **PROMPTS["padded"]), 6), expected)
        assert not handle.stats().notes


@pytest.mark.parametrize("tiers", TIERS)
@families("qwen2_5_vl")
def test_a_video(name, tiers):
    inputs = prompt_with_images(name)
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = VIDEO
    inputs["mm_token_type_ids"] *= 2
    inputs["pixel_values_videos"] = inputs.pop("pixel_values")
    inputs["video_grid_thw"] = inputs.pop("image_grid_thw")
    expected = run(model_of(name), inputs, 6)
    with scout_hf.patch(model_of(name), **TIERS[tiers]):
        assert_close(run(model_of(name), inputs, 6), expected)


@pytest.mark.parametrize("tiers", TIERS)
@families("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "hunyuan_vl", "lfm2_vl")
def test_prompts_in_chunks_that_end_within_an_image(name, tiers):
    inputs, options = prompt_with_images(name), {"prefill_chunk_size": 14}
    assert {*inputs["input_ids"][0, 13:15].tolist()} == {IMAGE}
    try:
        expected = run(model_of(name), inputs, 5, **options)
    except RuntimeError:
        # Before transformers 5.24; a patched model must not answer instead.
        with scout_hf.patch(model_of(name), **TIERS[tiers]), pytest.raises((RuntimeError, scout_hf.ScoutError)):
            run(model_of(name), inputs, 5, **options)
        pytest.skip("this transformers cannot read an image in chunks itself")
    with scout_hf.patch(model_of(name), **TIERS[tiers]) as handle:
        assert_close(run(model_of(name), inputs, 5, **options), expected)
        assert handle.stats().steps == 4 and not handle.stats().stock_passes


@families("glm4v")
def test_an_unknown_family_is_tried_after_an_image_prompt_and_its_positions_are_kept(name):
    run(model_of(name), prompt_with_images(name), 2)
    shift = model_of(name).model.rope_deltas
    assert shift.any()
    with scout_hf.patch(model_of(name), **ONE_TIER):
        assert model_of(name).model.rope_deltas is shift


def test_a_model_that_generates_by_one_inside_names_it():
    text = tiny_config("opt").to_dict() | {"model_type": "opt"}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "blip-2",
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        qformer_config=vision | {"encoder_hidden_size": 32, "vocab_size": 128},
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    inputs = prompt_with_images("llava")
    expected = run(model, inputs, 6)
    with pytest.raises(UnsupportedModelError, match=r"patch\(model.language_model\)"):
        scout_hf.patch(model)
    with scout_hf.patch(model.language_model, **ONE_TIER) as handle:
        assert_close(run(model, inputs, 6), expected)
        assert handle.stats().steps == 5
