"""Every handwritten family against the query that the model itself computes."""

import pytest
import torch
from torch import nn

from scout_hf.errors import UnsupportedModelError
from scout_hf.patches import ProbeFamily, family_of
from tests.patches.families import (
    LATENT_NAMES,
    NAMES,
    NO_NORM,
    NO_ROTARY,
    STACKED,
    attending,
    case,
    changed,
    known,
    probe_of,
    rotated,
    unprobed,
)
from tests.patches.oracle import decode_step, difference, predict
from tests.patches.tiny import tiny_gemma3_multimodal, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("name", NAMES + LATENT_NAMES)
@pytest.mark.thin(2)
def test_query_is_the_models_own(name, length, dtype):
    model = tiny_model(name, dtype=dtype)
    family = family_of(model)
    assert not isinstance(family, ProbeFamily)
    step = decode_step(model, family, length)
    assert len(step.layers) == 4 and attending(step)
    layers = family.layers(family.decoder(model))
    for index, seen in enumerate(step.layers):
        assert family.available(layers[index]) == (seen.query is not None)
    for index in attending(step):
        truth = step.layers[index].query
        assert truth.shape[0] == 2 and truth.shape[2] == length
        assert difference(predict(family, model, step, index), truth) <= 1e-6, index


@pytest.mark.parametrize("name", NAMES + LATENT_NAMES)
def test_probe_equals_handwritten(name):
    model = tiny_model(name)
    family = family_of(model)
    step, probe = decode_step(model, family, 2), probe_of(family)
    if unprobed(family, model):
        with pytest.raises(UnsupportedModelError, match="cannot be run on its own"):
            predict(probe, model, step, 3)
        return
    for index in attending(step):
        assert difference(predict(probe, model, step, index), step.layers[index].query) <= 1e-6, index
        assert probe.available(family.layers(family.decoder(model))[index])


@pytest.mark.parametrize("name", NAMES + LATENT_NAMES)
def test_positions_alone_suffice(name):
    """Without the previous layer's angles the family computes its own."""
    model = tiny_model(name)
    family = family_of(model)
    step = decode_step(model, family, 1)
    for index in attending(step):
        predicted = predict(family, model, step, index, position_embeddings=None)
        assert difference(predicted, step.layers[index].query) <= 1e-6


@pytest.mark.parametrize("name", NAMES + LATENT_NAMES)
def test_negative_controls_are_seen(name):
    """What a wrong family would do must be visible, or the tests above prove nothing."""
    model = tiny_model(name)
    family = family_of(model)
    step = decode_step(model, family, 2)
    index = rotated(name, step)
    truth = step.layers[index].query
    if name not in NO_NORM | STACKED:
        no_norm = changed(family, norm=lambda self, layer, hidden: hidden)
        assert difference(predict(no_norm, model, step, index), truth) > 1e-3
    if name not in NO_ROTARY:
        no_rotary = changed(family, rotate=lambda self, decoder, layer, attn, q, *rest: q)
        assert difference(predict(no_rotary, model, step, index), truth) > 1e-3
        elsewhere = step.layers[index].position_ids + 3
        shifted = predict(family, model, step, index, position_ids=elsewhere, position_embeddings=None)
        assert difference(shifted, truth) > 1e-3
    other = step.layers[index].hidden.roll(1, dims=-1)
    assert difference(predict(family, model, step, index, hidden=other), truth) > 1e-3


@pytest.mark.parametrize("name", [case("smollm3"), case("cohere2")])
def test_layers_without_rotary_stay_unrotated(name):
    model = tiny_model(name)
    family = family_of(model)
    step = decode_step(model, family, 1)
    truth = step.layers[1].query
    for position_ids in (step.layers[1].position_ids, step.layers[1].position_ids + 5):
        predicted = predict(family, model, step, 1, position_ids=position_ids, position_embeddings=None)
        assert difference(predicted, truth) == 0


def test_gemma3_recomputes_angles_when_the_layer_type_changes():
    model = tiny_model("gemma3")
    family = family_of(model)
    step = decode_step(model, family, 1)
    trusting = changed(family, position_embeddings=lambda self, decoder, attn, hidden, ids, given: given)
    for index in (1, 2, 3):
        assert difference(predict(trusting, model, step, index), step.layers[index].query) > 1e-3
        assert difference(predict(family, model, step, index), step.layers[index].query) == 0


def test_gemma3_keeps_angles_within_one_layer_type():
    types = ["sliding_attention", "sliding_attention", "full_attention", "full_attention"]
    model = tiny_model("gemma3", layer_types=types)
    family = family_of(model)
    step = decode_step(model, family, 1)
    for index, position_ids in ((1, None), (3, None), (2, step.layers[2].position_ids)):
        predicted = predict(family, model, step, index, position_ids=position_ids)
        assert difference(predicted, step.layers[index].query) == 0


def test_gemma3_multimodal_uses_its_text_decoder():
    model = tiny_gemma3_multimodal()
    family = family_of(model)
    assert not isinstance(family, ProbeFamily)
    step = decode_step(model, family, 2)
    for index in range(4):
        assert difference(predict(family, model, step, index), step.layers[index].query) <= 1e-6


def test_one_row_of_positions_serves_a_batch():
    model = tiny_model("llama")
    family = family_of(model)
    step = decode_step(model, family, 1)
    row = step.layers[2].position_ids[:1]
    predicted = predict(family, model, step, 2, position_ids=row, position_embeddings=None)
    assert difference(predicted[:1], step.layers[2].query[:1]) == 0


def test_missing_positions_are_named():
    model = tiny_model("llama")
    family = family_of(model)
    step = decode_step(model, family, 1)
    with pytest.raises(ValueError, match="position_ids"):
        predict(family, model, step, 2, position_ids=None, position_embeddings=None)


@known
class Adapter(nn.Module):
    """A linear layer with a low-rank addition, as LoRA puts it in place of a projection."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("probe", [False, True], ids=["handwritten", "probe"])
def test_wrapped_projection_is_called(probe):
    model = tiny_model("qwen3")
    family = ProbeFamily() if probe else family_of(model)
    before = predict(family, model, decode_step(model, family, 1), 2)
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapter(layer.self_attn.q_proj)
    step = decode_step(model, family, 1)
    after = predict(family, model, step, 2)
    assert difference(after, step.layers[2].query) <= 1e-6
    assert difference(after, before) > 1e-3


def test_subclass_of_an_attention_class_finds_its_rotary_function():
    model = tiny_model("llama")
    family = family_of(model)
    step = decode_step(model, family, 1)
    attn = model.model.layers[1].self_attn
    attn.__class__ = type("MyAttention", (type(attn),), {"__module__": __name__})
    assert difference(predict(family, model, step, 1), step.layers[1].query) == 0


@pytest.mark.parametrize("probe", [False, True], ids=["handwritten", "probe"])
def test_weights_on_meta_are_not_available(probe):
    model = tiny_model("llama")
    family = ProbeFamily() if probe else family_of(model)
    layers = family.layers(family.decoder(model))
    assert all(family.available(layer) for layer in layers)
    layers[2].self_attn.to("meta")
    assert [family.available(layer) for layer in layers] == [True, True, False, True]


@pytest.mark.parametrize("probe", [False, True], ids=["handwritten", "probe"])
def test_accelerate_offload(probe):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    family = ProbeFamily() if probe else family_of(model)
    step = decode_step(model, family, 1)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert not any(family.available(layer) for layer in model.model.layers)
    accelerate.hooks.remove_hook_from_submodules(model)

    model = tiny_model("llama")
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert "forward" in vars(model.model.layers[1]) or "forward" in vars(model)
    for index in range(4):
        assert family.available(model.model.layers[index])
        assert difference(predict(family, model, step, index), step.layers[index].query) <= 1e-6
