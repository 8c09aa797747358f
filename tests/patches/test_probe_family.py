"""The generic fallback: it must see the true query and leave no trace."""

import threading

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from scout_hf.errors import UnsupportedModelError
from scout_hf.patches import ProbeFamily, family_of
from scout_hf.patches.probe import CAPTURE, Captured, private_view
from tests.patches.families import known
from tests.patches.oracle import decode_step, difference, predict
from tests.patches.tiny import tiny_config, tiny_model


class UnknownConfig(LlamaConfig):
    model_type = "never_heard_of"


class Unknown(LlamaForCausalLM):
    config_class = UnknownConfig


def unknown_model():
    config = tiny_config("llama").to_dict()
    del config["model_type"]
    torch.manual_seed(0)
    return Unknown(UnknownConfig(**config)).eval()


def fingerprint(model):
    """All that a probe could have changed: module attributes, children, hooks, configs."""
    state = {}
    for name, module in model.named_modules():
        attributes = {}
        for key, value in vars(module).items():
            if isinstance(value, dict):
                value = {k: id(v) for k, v in value.items()}
            elif isinstance(value, PreTrainedConfig):
                value = (id(value), value._attn_implementation, repr(value))
            elif not isinstance(value, (int, float, str, type(None))):
                value = id(value)
            attributes[key] = value
        state[name] = (id(module), attributes)
    return state


def test_an_unknown_type_gets_the_probe_and_it_is_exact():
    model = unknown_model()
    family = family_of(model)
    assert type(family) is ProbeFamily
    step = decode_step(model, family, 3)
    for index in range(4):
        assert difference(predict(family, model, step, index), step.layers[index].query) == 0


def test_layers_are_found_under_any_name():
    model = unknown_model()
    decoder = model.model
    layers, decoder.blocks = decoder.layers, nn.Module()
    del decoder.layers
    decoder.blocks.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(4))
    decoder.blocks.stack = layers
    assert ProbeFamily().layers(decoder) is layers
    del decoder.blocks.stack
    with pytest.raises(AttributeError, match="no list of 4 layers with attention"):
        ProbeFamily().layers(decoder)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_neox", "opt", "qwen3_moe"])
def test_nothing_on_the_model_changes(name):
    model = tiny_model(name)
    family = ProbeFamily()
    step = decode_step(model, family, 1)
    before, names = fingerprint(model), set(AttentionInterface._global_mapping)
    for index in range(4):
        predict(family, model, step, index)
    assert fingerprint(model) == before
    assert set(AttentionInterface._global_mapping) == names
    assert difference(decode_step(model, family, 1).logits, step.logits) == 0


def test_nothing_changes_when_the_layer_fails():
    model = tiny_model("llama")
    family = ProbeFamily()
    step = decode_step(model, family, 1)
    before = fingerprint(model)
    with pytest.raises(RuntimeError):
        predict(family, model, step, 2, hidden=torch.zeros(2, 1, 63))
    assert fingerprint(model) == before


def test_another_thread_is_not_captured():
    model = tiny_model("llama")
    family = ProbeFamily()
    step = decode_step(model, family, 1)
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        expected = model(ids).logits
    stop, errors, forwards = threading.Event(), [], []

    def use_the_model():
        try:
            while not stop.is_set():
                with torch.no_grad():
                    forwards.append(torch.equal(model(ids).logits, expected))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=use_the_model)
    thread.start()
    try:
        for turn in range(200):
            assert difference(predict(family, model, step, turn % 4), step.layers[turn % 4].query) == 0
    finally:
        stop.set()
        thread.join()
    assert not errors and forwards and all(forwards)


def test_a_replaced_forward_is_passed_by():
    """What a user puts in place of a method is as much theirs as a hook; here it would give another query."""
    model = tiny_model("llama")
    family = ProbeFamily()
    attn = model.model.layers[1].self_attn
    original = type(attn).forward

    def doubled(self, hidden_states, **kwargs):
        return original(self, 2 * hidden_states, **kwargs)

    step = decode_step(model, family, 1)
    attn.forward = doubled.__get__(attn)
    assert difference(decode_step(model, family, 1).layers[1].query, step.layers[1].query) > 1e-3
    assert difference(predict(family, model, step, 1), step.layers[1].query) == 0


def test_the_view_shares_weights_and_keeps_the_models_config():
    model = tiny_model("llama")
    layer = model.model.layers[0]
    view = private_view(layer, model.model)
    assert view is not layer and view.self_attn is not layer.self_attn
    assert view.self_attn.q_proj is layer.self_attn.q_proj and view.mlp.down_proj is layer.mlp.down_proj
    assert view.self_attn.config._attn_implementation == CAPTURE
    assert layer.self_attn.config._attn_implementation == model.config._attn_implementation != CAPTURE


@known
class Deaf(nn.Module):
    """A decoder layer that attends without asking the interface."""

    def __init__(self, inner):
        super().__init__()
        self.self_attn = inner

    def forward(self, hidden, **kwargs):
        return hidden


@known
class Picky(Deaf):
    def forward(self, hidden, something_else):
        return hidden


@pytest.mark.parametrize("layer_class, message", [(Deaf, "never called"), (Picky, "cannot be run on its own")])
def test_a_layer_that_cannot_be_probed_is_named(layer_class, message):
    model = tiny_model("llama")
    layer = layer_class(model.model.layers[0].self_attn)
    positions = torch.arange(2).unsqueeze(0)
    with pytest.raises(UnsupportedModelError, match=f"{layer_class.__name__}.*{message}.*register_family"):
        ProbeFamily().query(model.model, layer, torch.zeros(1, 2, 64), positions)


def test_a_layer_without_attention_is_not_available():
    assert not ProbeFamily().available(nn.Linear(2, 2))


def test_captured_carries_the_query():
    query = torch.ones(1)
    with pytest.raises(Captured) as caught:
        AttentionInterface()[CAPTURE](None, query, None, None, None, scaling=1.0)
    assert caught.value.query is query
