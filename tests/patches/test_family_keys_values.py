"""Every family against the keys and values that the stock model hands to its cache."""

import pytest
import torch
from torch import nn

from scout_hf.errors import UnsupportedModelError
from scout_hf.patches import ProbeFamily, family_of
from scout_hf.patches.unpredicted import Unpredicted
from tests.patches.families import (
    LATENT_NAMES,
    NAMES,
    NO_ROTARY,
    STACKED,
    attending,
    case,
    changed,
    known,
    probe_of,
    rotated,
    storing,
    unprobed,
)
from tests.patches.oracle import decode_step, difference, predict, prompt_pass, relative
from tests.patches.tiny import TINY, longrope, tiny_gemma3_multimodal, tiny_model

# Parts of the largest key or value; only the order of sums in a matrix product may differ.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6}
# Its first tokens are padding in the second row.
PART = slice(2, 11)
NAMES = [name for name in NAMES if not STACKED & set(name.values)]
EITHER = pytest.mark.parametrize("probe", [False, True], ids=["handwritten", "probe"])


def precise(name, **overrides):
    """The model in float64, and its family."""
    # Eager attention makes NaN of padding in float64: its softmax in float32 finds the mask to be -inf everywhere.
    model = tiny_model(name, dtype=torch.float32 if TINY[name].eager else torch.float64, **overrides)
    if not TINY[name].eager:
        model.set_experts_implementation("eager")  # the default one knows no float64
    return model, family_of(model)


def made(family, model, step, index, part=slice(None), **changes):
    """Keys and values of the tokens in `part`, from nothing but these tokens' inputs."""
    seen, previous = step.layers[index], step.layers[max(index - 1, 0)]
    angles = previous.position_embeddings
    inputs = {
        "hidden": seen.hidden[:, part],
        "position_ids": None if seen.position_ids is None else seen.position_ids[:, part],
        "position_embeddings": None if angles is None else tuple(one[:, part] for one in angles),
    }
    return predict(family, model, step, index, "keys_values", **(inputs | changes))


def errors(pair, seen, part=slice(None)):
    """Of keys and of values, relative to the largest."""
    return [relative(one, truth[:, :, part]) for one, truth in zip(pair, (seen.keys, seen.values), strict=True)]


def rounding(seen):
    return ROUNDING[seen.keys.dtype]


@EITHER
@pytest.mark.parametrize("name", NAMES)
def test_they_are_what_reaches_the_cache(name, probe):
    model, family = precise(name)
    assert not isinstance(family, ProbeFamily)
    step = prompt_pass(model, family)
    whole, family = family, probe_of(family) if probe else family
    assert attending(step)
    if probe and unprobed(whole, model):
        with pytest.raises(UnsupportedModelError, match="cannot be run on its own"):
            made(family, model, step, 3)
        return
    for index in attending(step):
        seen = step.layers[index]
        assert seen.keys.shape[::2] == (2, 20)
        for part in (slice(None), PART, slice(13, 14)):
            given = made(family, model, step, index, part)
            again = made(family, model, step, index, part, position_embeddings=None)
            assert max(errors(given, seen, part)) <= rounding(seen), (index, part)
            assert [relative(*pair) for pair in zip(again, given, strict=True)] == [0, 0], (index, part)


@pytest.mark.parametrize("name", LATENT_NAMES)
def test_latents_are_what_reaches_the_cache(name):
    model = tiny_model(name)
    family = family_of(model)
    step = prompt_pass(model, family)
    for index in attending(step):
        seen = step.layers[index]
        pair = predict(family, model, step, index, "keys_values", position_embeddings=None)
        assert max(errors(pair, seen)) <= rounding(seen)
        if name not in NO_ROTARY:
            elsewhere = predict(
                family, model, step, index, "keys_values", position_ids=seen.position_ids + 3, position_embeddings=None
            )
            assert max(errors(elsewhere, seen)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thin(2)
def test_new_tokens_of_a_step(name, length, dtype):
    """In the dtypes that models have, behind a prompt that is cached."""
    model = tiny_model(name, dtype=dtype)
    family = family_of(model)
    step = decode_step(model, family, length)
    for index in storing(model, step):
        seen = step.layers[index]
        for way in ({}, {"position_embeddings": None}):
            keys, values = predict(family, model, step, index, "keys_values", **way)
            assert difference(keys, seen.keys) <= 1e-6 and difference(values, seen.values) <= 1e-6, index


@pytest.mark.parametrize("name", NAMES)
def test_negative_controls_are_seen(name):
    """What a wrong family would do must be visible, or the tests above prove nothing."""
    model, family = precise(name)
    step = prompt_pass(model, family)
    index = rotated(name, step)
    seen = step.layers[index]
    if name not in NO_ROTARY:
        no_rotary = changed(family, rotate=lambda self, decoder, layer, attn, q, *rest: q)
        assert errors(made(no_rotary, model, step, index), seen)[0] > 1e-3
        shifted = made(family, model, step, index, position_ids=seen.position_ids + 3, position_embeddings=None)
        assert errors(shifted, seen)[0] > 1e-3 and errors(shifted, seen)[1] <= rounding(seen)
    own = family.project_keys_values
    swapped = changed(family, project_keys_values=lambda self, attn, x: own(attn, x)[::-1])
    assert min(errors(made(swapped, model, step, index), seen)) > 1e-3
    other = made(family, model, step, index, hidden=seen.hidden.roll(1, dims=-1))
    assert min(errors(other, seen)) > 1e-3


@pytest.mark.parametrize(
    "name", [case(name) for name in ("qwen3", "gemma3", "apertus", "olmo2", "cohere_qk_norm", "stablelm_qk_norm")]
)
def test_a_forgotten_norm_of_keys_is_seen(name):
    model, family = precise(name)
    step = prompt_pass(model, family)
    attn = family.attention(family.layers(family.decoder(model))[2])
    norm = "k_layernorm" if hasattr(attn, "k_layernorm") else "k_norm"
    setattr(attn, norm, nn.Identity())
    keys, values = errors(made(family, model, step, 2), step.layers[2])
    assert keys > 1e-3 and values <= 1e-12


@pytest.mark.parametrize("name", [case("gemma4_shared"), case("gemma3n")])
def test_layers_that_share_have_none(name):
    model = tiny_model(name)
    family = family_of(model)
    step = decode_step(model, family, 1)
    assert storing(model, step) == [0, 1] and attending(step) == [0, 1, 2, 3]
    with pytest.raises(UnsupportedModelError, match="keys and values"):
        predict(family, model, step, 3, "keys_values")


def test_gemma3_multimodal_uses_its_text_decoder():
    model = tiny_gemma3_multimodal().to(torch.float64)
    family = family_of(model)
    step = prompt_pass(model, family)
    for index in range(4):
        assert max(errors(made(family, model, step, index, PART), step.layers[index], PART)) <= 1e-12


@known
class Bent(nn.Module):
    """Stands in a projection's place and answers something else, as LoRA and quantised linears do."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        y = self.base(x)
        return y + torch.linspace(0, 1, y.shape[-1], dtype=y.dtype) * x.sum(-1, keepdim=True)


WRAPPED = [("qwen3", "k_proj"), ("qwen3", "v_proj"), ("phi3", "qkv_proj"), ("gpt2", "c_attn")]
WRAPPED += [("gpt_neox", "query_key_value"), ("opt", "k_proj"), ("olmo2", "k_proj"), ("cohere", "v_proj")]


@EITHER
@pytest.mark.parametrize("name, projection", [case(*one) for one in WRAPPED])
def test_wrapped_projection_is_called(name, projection, probe):
    model, family = precise(name)
    before = prompt_pass(model, family)
    for layer in family.layers(family.decoder(model)):
        attn = family.attention(layer)
        setattr(attn, projection, Bent(getattr(attn, projection)))
    step = prompt_pass(model, family)
    family = probe_of(family) if probe else family
    for index in range(4):
        assert max(errors(made(family, model, step, index, PART), step.layers[index], PART)) <= 1e-12
    # The first layer's inputs are the same with and without.
    assert max(errors(made(family, model, step, 0), before.layers[0])) > 1e-3


@EITHER
def test_accelerate_hooks_are_followed(probe):
    accelerate = pytest.importorskip("accelerate")
    model, family = precise("qwen3")
    step = prompt_pass(model, family)
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    family = probe_of(family) if probe else family
    for index in range(4):
        assert max(errors(made(family, model, step, index), step.layers[index])) <= 1e-12


@EITHER
def test_one_row_of_positions_serves_a_batch(probe):
    model, family = precise("llama")
    step = prompt_pass(model, family)
    seen = step.layers[2]
    family = probe_of(family) if probe else family
    keys, values = made(family, model, step, 2, position_ids=seen.position_ids[:1], position_embeddings=None)
    assert errors((keys, values), seen)[0] > 1e-3  # the second row's positions are others
    seen.keys[1] = keys[1]
    assert max(errors((keys, values), seen)) <= 1e-12


def test_missing_positions_are_named():
    model, family = precise("llama")
    step = prompt_pass(model, family)
    with pytest.raises(ValueError, match="position_ids"):
        made(family, model, step, 2, position_ids=None, position_embeddings=None)


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 16}
LONG = longrope(16)
GROWING = pytest.mark.parametrize("name, rope", [("llama", DYNAMIC), ("phi3", LONG)], ids=["dynamic", "longrope"])


@EITHER
@GROWING
def test_angles_that_depend_on_the_length_are_refused(name, rope, probe):
    model, family = precise(name, **rope)
    step = prompt_pass(model, family)
    family = probe_of(family) if probe else family
    rotary = family.decoder(model).rotary_emb
    before = rotary.inv_freq.clone()
    with pytest.raises(UnsupportedModelError, match=f"rope_type '{rotary.rope_type}'.*length of the sequence"):
        made(family, model, step, 2, PART, position_embeddings=None)
    assert torch.equal(rotary.inv_freq, before)
    # Angles of the pass itself are as good as any.
    assert max(errors(made(family, model, step, 2, PART), step.layers[2], PART)) <= 1e-12


@GROWING
def test_such_angles_of_a_part_would_be_others(name, rope):
    """Else there would be no reason to refuse."""
    model, family = precise(name, **rope)
    step = prompt_pass(model, family)
    trusting = changed(family, require_fixed_angles=lambda self, *args: None)
    found = []
    for part in (slice(0, 18), slice(0, 10)):  # transformers 5.4 stretches for any length but never goes back
        got = made(trusting, model, step, 2, part, position_embeddings=None)
        found.append(errors(got, step.layers[2], part)[0])
    assert max(found) > 1e-3


def test_families_without_prediction_say_so():
    with pytest.raises(UnsupportedModelError, match="Linear cannot be made.*available"):
        Unpredicted().keys_values(None, nn.Linear(2, 2), torch.zeros(1, 1, 2))
