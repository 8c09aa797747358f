"""A layer's query is predicted by its own parts: nobody who watches or steers these parts sees it, nothing changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import scout_hf
from scout_hf import UnsupportedModelError
from scout_hf.compat.cache_names import CACHE
from tests.integration.common import (
    EXACT_METHODS,
    ONE_TIER,
    TWO_TIERS,
    assert_close,
    assert_equal,
    left_padded,
    llama,
    prompt,
    run,
)
from tests.integration.models import unknown
from tests.patches.tiny import tiny_model

REAL = TWO_TIERS | {"layer_ahead": True, "cpu_query": "real"}
"""Exact, and predicted in every step all the same."""
PREDICTED = TWO_TIERS | {"layer_ahead": True, "cpu_query": "predicted"}
NEW = 8


def parts_of(model):
    """Whatever prediction could call, in every layer."""
    layers = model.get_decoder().layers
    return [module for layer in layers for module in layer.modules()] + [model.get_decoder().rotary_emb]


def not_predicted(handle):
    return [note for note in handle.stats().notes if note.startswith("prediction: off")]


class Watch:
    """Hooks of every kind that torch has for a forward pass, on every part, and how often each was called."""

    def __init__(self, model, remember=False):
        self.calls, self.seen = {}, []
        self.names = {id(module): name for name, module in model.named_modules()}
        for module in parts_of(model):
            module.register_forward_pre_hook(self.count("before"))
            module.register_forward_pre_hook(self.count("before, keywords"), with_kwargs=True)
            module.register_forward_hook(self.count("after"))
            module.register_forward_hook(self.count("always"), always_call=True)

    def count(self, kind):
        def hook(module, *args):
            key = self.names[id(module)], kind
            self.calls[key] = self.calls.get(key, 0) + 1

        return hook

    def taken(self):
        calls, self.calls = self.calls, {}
        return calls


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "phi3", "cohere", "stablelm_qk_norm", "unknown"])
def test_hooks_run_as_often_as_in_the_stock_model(name):
    """Gemma3 computes other angles for half its layers, StableLM has norms with parts, the last is probed."""
    model = unknown() if name == "unknown" else tiny_model(name)
    watch = Watch(model)
    expected = run(model, prompt(), new=NEW)
    calls = watch.taken()
    assert calls and min(calls.values()) == NEW
    for settings in (ONE_TIER, REAL, PREDICTED):
        with scout_hf.patch(model, **settings) as handle:
            assert watch.taken() == {}
            got = run(model, prompt(), new=NEW)
            assert watch.taken() == calls
            assert settings is not PREDICTED or handle.stats().cosine is not None
            assert not_predicted(handle) == []
        if settings is not PREDICTED:
            assert_close(got, expected, 1e-4)


def test_hooks_of_all_modules_run_as_often_as_in_the_stock_model():
    model, calls = llama(), []
    hooks = [register_module_forward_hook(lambda module, *_: calls.append(type(module)))]
    hooks += [register_module_forward_pre_hook(lambda module, *_: calls.append(type(module)))]
    try:
        run(model, prompt(), new=NEW)
        expected, calls[:] = list(calls), []
        with scout_hf.patch(model, **PREDICTED) as handle:
            run(model, prompt(), new=NEW)
            assert handle.stats().cosine is not None
        assert calls == expected
    finally:
        [hook.remove() for hook in hooks]


PARTS = ["input_layernorm", "self_attn.q_proj", "self_attn"]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("when", ["before patch", "after patch", "while the cache is in use"])
def test_steering_is_as_in_the_stock_model(part, when):
    """A hook that changes what a part gives, and counts: stronger with each call, so that one call more shows."""

    def steer(model):
        for index, layer in enumerate(model.model.layers):
            turns = iter(range(10**6))

            def hook(module, args, output, turns=turns, index=index):
                factor = 1 + 0.02 * (next(turns) + index)
                return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

            layer.get_submodule(part).register_forward_hook(hook)
        return model

    stock, model = llama(), llama()
    if when == "while the cache is in use":
        first = run(stock, prompt(), new=NEW)
        second = run(steer(stock), first.sequences, new=NEW, past_key_values=first.past_key_values)
        with scout_hf.patch(model, **REAL):
            first = run(model, prompt(), new=NEW)
            got = run(steer(model), first.sequences, new=NEW, past_key_values=first.past_key_values)
        assert_close(got, second)
        return
    expected = run(steer(stock), prompt(), new=2 * NEW)
    if when == "before patch":
        steer(model)
    with scout_hf.patch(model, **REAL):
        if when == "after patch":
            steer(model)
        assert_close(run(model, prompt(), new=2 * NEW), expected)


# -- parts that are made of others, or change ------------------------------------------------------------------------


def with_lora(model, dropout=0.0):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False, lora_dropout=dropout)
    torch.manual_seed(3)
    return peft.get_peft_model(model, config)


def test_lora_is_predicted_and_its_hooks_rest():
    model = with_lora(llama())
    inner = model.get_base_model()
    calls = []
    for name, module in inner.named_modules():
        if "q_proj" in name:
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    expected = run(inner, prompt(), new=NEW)
    stock, calls[:] = sorted(calls), []
    assert {name.split(".q_proj")[1] for name in stock} >= {"", ".base_layer", ".lora_A.default", ".lora_B.default"}
    with scout_hf.patch(model, **REAL) as handle:
        assert_close(run(inner, prompt(), new=NEW), expected)
        assert sorted(calls) == stock
        assert handle.stats().cosine is not None and not_predicted(handle) == []


def test_hooks_inside_lora_do_not_change_what_is_predicted():
    quiet, watched = (with_lora(llama()).get_base_model() for _ in range(2))
    for module in watched.modules():
        module.register_forward_hook(lambda *_: None)
    with scout_hf.patch(quiet, **PREDICTED), scout_hf.patch(watched, **PREDICTED):
        assert_equal(run(watched, prompt(), new=NEW), run(quiet, prompt(), new=NEW))


def test_dropout_of_an_adapter_in_training_mode_is_drawn_once():
    model = with_lora(llama(), dropout=0.3).get_base_model()
    for layer in model.model.layers:
        layer.self_attn.q_proj.lora_dropout.train()
    torch.manual_seed(5)
    expected = run(model, prompt(), new=NEW)
    state = torch.get_rng_state()
    with scout_hf.patch(model, **REAL) as handle:
        torch.manual_seed(5)
        assert_close(run(model, prompt(), new=NEW), expected)
        assert torch.equal(torch.get_rng_state(), state)
        assert "training mode" in not_predicted(handle)[0]


class Counting(nn.Module):
    """In a projection's place: its answer depends on how often it was asked, as an 8-bit layer's on its history."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.turns = inner, 0
        self.register_buffer("most", torch.zeros(()))

    def forward(self, x):
        self.turns += 1
        self.most.copy_(torch.maximum(self.most, x.abs().max()))
        return self.inner(x) * (1 + 0.05 * self.turns + 0.1 * self.most)


class CountingLinear(nn.Linear):
    turns = 0

    def forward(self, x):
        self.turns += 1
        return super().forward(x) * (1 + 0.05 * self.turns)


def counting(model, kind):
    for layer in model.model.layers:
        linear = layer.self_attn.q_proj
        if kind is Counting:
            layer.self_attn.q_proj = Counting(linear)
        else:
            linear.__class__ = CountingLinear
    return model


@pytest.mark.parametrize("kind", [Counting, CountingLinear])
def test_parts_that_could_change_are_not_called_and_this_is_said(kind):
    model = counting(llama(), kind)
    inner = copy.deepcopy(model)
    expected = run(inner, prompt(), new=NEW)
    with scout_hf.patch(model, **REAL) as handle:
        got = run(model, prompt(), new=NEW)
        (line,) = not_predicted(handle)
        assert kind.__name__ in line and "unknown package" in line and "layers 1 to 2" in line
    assert_close(got, expected)
    for ours, theirs in zip(model.model.layers, inner.model.layers):
        assert ours.self_attn.q_proj.turns == theirs.self_attn.q_proj.turns == NEW
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model.buffers(), inner.buffers(), strict=True))


@pytest.mark.parametrize("kind", [Counting, CountingLinear])
def test_the_trial_run_of_an_unknown_family_changes_nothing(kind):
    """Its answers change with every call, so that it is refused; that too only for a twin."""
    model = counting(unknown(), kind)
    model.model.layers[1].train()
    model.model.layers[1].mlp.eval()
    before = copy.deepcopy(model)
    watch = Watch(model)
    with pytest.raises(UnsupportedModelError, match="unknown family.*logits differ"):
        scout_hf.patch(model)
    assert watch.calls == {} and all(layer.self_attn.q_proj.turns == 0 for layer in model.model.layers)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before.buffers(), strict=True))
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]


def test_an_unknown_family_is_not_probed_through_parts_that_could_change():
    model = unknown()
    expected = run(counting(copy.deepcopy(model), Counting), prompt(), new=NEW)
    with scout_hf.patch(model, **REAL) as handle:
        assert_close(run(counting(model, Counting), prompt(), new=NEW), expected)
        (line,) = not_predicted(handle)
        assert "Counting" in line and "unknown package" in line
    assert all(layer.self_attn.q_proj.turns == NEW for layer in model.model.layers)


def test_quantised_projections_are_predicted():
    """torch's own 8-bit layers, which keep their weights where no parameter is."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no 8-bit kernels in this torch")
    model = llama()
    for layer in model.model.layers:
        torch.ao.quantization.quantize_dynamic(layer.self_attn, {nn.Linear}, inplace=True)
    assert "quantized" in type(model.model.layers[1].self_attn.q_proj).__module__
    expected = run(model, prompt(), new=NEW)
    with scout_hf.patch(model, **REAL) as handle:
        assert_close(run(model, prompt(), new=NEW), expected)
        assert handle.stats().cosine is not None and not_predicted(handle) == []


def test_parametrised_and_compiled_parts_are_predicted():
    model = llama()
    for layer in model.model.layers:
        nn.utils.parametrizations.weight_norm(layer.self_attn.q_proj)
        layer.input_layernorm = torch.compile(layer.input_layernorm, backend="eager")
    expected = run(model, prompt(), new=NEW)
    with scout_hf.patch(model, **PREDICTED) as handle, scout_hf.patch(plain := llama(), **PREDICTED):
        got = run(model, prompt(), new=NEW)
        assert not_predicted(handle) == []
        assert_close(got, run(plain, prompt(), new=NEW), 1e-4)
    with scout_hf.patch(model, **REAL):
        assert_close(run(model, prompt(), new=NEW), expected)


def test_a_replaced_forward_is_called_as_often_as_in_the_stock_model():
    """A recorder that is no hook: it stands in place of the method."""
    model, calls = llama(), []
    for index, layer in enumerate(model.model.layers):
        for module in (layer.input_layernorm, layer.self_attn.q_proj):

            def recording(x, forward=module.forward, index=index):
                calls.append(index)
                return forward(x)

            module.forward = recording
    expected = run(model, prompt(), new=NEW)
    stock, calls[:] = list(calls), []
    with scout_hf.patch(model, **REAL) as handle:
        assert_close(run(model, prompt(), new=NEW), expected)
        assert calls == stock and handle.stats().cosine is not None


# -- accelerate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "self_attn.q_proj", "input_layernorm", "self_attn.k_proj"])
def test_weights_that_come_for_a_pass_are_brought_once(part):
    """accelerate puts them on the meta device in between, whole layers or single parts."""
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    expected = run(model, prompt(), new=NEW)
    brought = []

    class Noting(accelerate.hooks.AlignDevicesHook):
        def pre_forward(self, module, *args, **kwargs):
            brought.append(module)
            return super().pre_forward(module, *args, **kwargs)

    for layer in model.model.layers:
        for module in layer.get_submodule(part).modules():
            if list(module.parameters(recurse=False)):
                hook = Noting("cpu", offload=True, weights_map=weights(module))
                accelerate.hooks.add_hook_to_module(module, hook)
    assert any(weight.is_meta for weight in model.parameters())
    assert_close(run(model, prompt(), new=NEW), expected)
    stock, brought[:] = list(brought), []
    with scout_hf.patch(model, **REAL):
        assert_close(run(model, prompt(), new=NEW), expected)
    assert [id(module) for module in brought] == [id(module) for module in stock]


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# -- attention that was replaced or wrapped --------------------------------------------------------------------------


class Wrapped(nn.Module):
    """An adapter around attention: forwards, and changes the output a little."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        out, *rest = self.inner(*args, **kwargs)
        return out * 1.25, *rest


class Showing(Wrapped):
    """One that also shows what is inside, as many wrappers do."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


class Fused(nn.Module):
    """q, k and v in one matrix; under the name of q_proj it makes a query of another width."""

    def __init__(self, attn, name):
        super().__init__()
        three = (attn.q_proj, attn.k_proj, attn.v_proj)
        linear = nn.Linear(three[0].in_features, sum(one.out_features for one in three), bias=False)
        linear.weight.data = torch.cat([one.weight.data for one in three])
        self.add_module(name, linear)
        self.name, self.widths = name, [one.out_features for one in three]
        self.o_proj, self.config, self.layer_idx = attn.o_proj, attn.config, attn.layer_idx
        self.head_dim, self.scaling, self.num_key_value_groups = attn.head_dim, attn.scaling, attn.num_key_value_groups
        self.is_causal, self.attention_dropout = True, 0.0

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        from transformers.models.llama import modeling_llama

        cache = kwargs.get(CACHE, kwargs.get("past_key_value"))
        made = getattr(self, self.name)(hidden_states).split(self.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in made)
        q, k = modeling_llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2)), weights


REPLACEMENTS = {
    "wrapped": Wrapped,
    "wrapped, shown": Showing,
    "wrapped twice": lambda attn: Wrapped(Wrapped(attn)),
    "fused": lambda attn: Fused(attn, "qkv_proj"),
    "fused, same name": lambda attn: Fused(attn, "q_proj"),
}


def replace(model, how):
    for layer in model.model.layers[1:]:
        layer.self_attn = REPLACEMENTS[how](layer.self_attn)
    return model


@pytest.mark.parametrize("make", [llama, unknown], ids=["known family", "unknown family"])
@pytest.mark.parametrize("how", REPLACEMENTS)
@pytest.mark.parametrize("when", ["before patch", "after patch", "while the cache is in use"])
@pytest.mark.thin(2)
def test_replaced_attention_is_served(make, how, when):
    inputs = left_padded(0, 9)
    stock, model = make(), make()
    if when != "while the cache is in use":
        replace(stock, how)
    expected = run(stock, inputs, new=NEW)
    for settings in (ONE_TIER, REAL):
        model = make()
        if when == "before patch":
            replace(model, how)
        with scout_hf.patch(model, **settings):
            if when == "after patch":
                replace(model, how)
            got = run(model, inputs, new=NEW)
            assert_close(got, expected)
            if when == "while the cache is in use":
                more = run(
                    replace(copy.deepcopy(stock), how),
                    with_ones(inputs, expected),
                    new=NEW,
                    past_key_values=copy.deepcopy(expected.past_key_values),
                )
                again = run(replace(model, how), with_ones(inputs, got), new=NEW, past_key_values=got.past_key_values)
                assert_close(again, more)


def with_ones(inputs, output):
    new = output.sequences.shape[1] - inputs["input_ids"].shape[1]
    ones = torch.ones(len(output.sequences), new, dtype=torch.long)
    return {"input_ids": output.sequences, "attention_mask": torch.cat([inputs["attention_mask"], ones], dim=1)}


# -- keys that are made again -----------------------------------------------------------------------------------------


def steer_keys(part):
    def steer(model):
        for layer in model.model.layers:
            layer.get_submodule(part).register_forward_hook(lambda module, args, output: output * 1.5)

    return steer


def steer_layers(model):
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: (args[0].roll(1, -1), *args[1:]))


def steer_methods(model):
    for layer in model.model.layers:
        forward = layer.self_attn.k_proj.forward
        layer.self_attn.k_proj.forward = lambda x, forward=forward: forward(x) * 1.5


CHANGES = {
    "key projection": steer_keys("self_attn.k_proj"),
    "norm": steer_keys("input_layernorm"),
    "layer": steer_layers,
    "method": steer_methods,
    "wrapped": lambda model: replace(model, "wrapped"),
    "fused": lambda model: replace(model, "fused"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_keys_are_made_again_only_where_they_are_those_that_were_stored(change):
    """KVPR makes keys from a layer's inputs: what was steered since cannot be made so, what came before can."""
    settings = EXACT_METHODS["kvpr"] | {"split": "cpu", "method_options": {"share": 1.0}}
    made = {"num_key_value_heads": 8}
    stock, model = llama(**made), llama(**made)
    first = run(stock, prompt(), new=NEW)
    CHANGES[change](stock)
    expected = run(stock, first.sequences, new=4 * NEW, past_key_values=first.past_key_values)
    with scout_hf.patch(model, **settings) as handle:
        first = run(model, prompt(), new=NEW)
        assert handle.exact and handle._hooks.counters.sums["recomputed"][1] > 0
        CHANGES[change](model)
        got = run(model, first.sequences, new=4 * NEW, past_key_values=first.past_key_values)
    assert_close(got, expected, 1e-5)
