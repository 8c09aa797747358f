"""Every family: exact against stock, and exact with prediction on where the predicted query is the true one."""

import copy

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    BertConfig,
    DynamicCache,
    LlamaForCausalLM,
    T5Config,
)
from transformers.models.llama import modeling_llama

import scout_hf
from scout_hf import ScoutCache, UnsupportedModelError
from scout_hf.cache_layer import ScoutLayer
from scout_hf.compat.cache_names import given_cache
from scout_hf.patches import ProbeFamily, family_of
from tests.integration.common import ONE_TIER, TWO_TIERS, left_padded, llama, logits, prompt, run
from tests.integration.models import silence, snapshot, unknown
from tests.patches.families import UNPREDICTED
from tests.patches.tiny import ALL, missing, tiny_gemma3_multimodal, tiny_model

INPUTS = left_padded(0, 9, tokens=40)
TOLERANCE = 1e-5
"""Of the largest logit: these weights are rough, so that a forgotten norm or bias shows."""


def case(name):
    reason = missing(name)
    return pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=reason))


NAMES = [case(name) for name in ALL]
NEVER_SILENT = {"opt_post_norm", "gemma3n"}
"""Their residual stream is normalised or mixed: no choice of weights makes one layer's input that of the next."""


def relative_error(got, expected):
    truth = logits(expected)
    return (logits(got) - truth).abs().max().item() / max(1.0, truth.abs().max().item())


def assert_exact(got, expected, tolerance=TOLERANCE):
    assert torch.equal(got.sequences, expected.sequences)
    error = relative_error(got, expected)
    assert error <= tolerance, error


def skip_if_inert(model, expected):
    """Some versions give a hybrid model its own cache class; then patching changes nothing at all."""
    if not isinstance(expected.past_key_values, DynamicCache):
        with scout_hf.patch(model, **TWO_TIERS):
            assert_exact(run(model, INPUTS, new=6), expected, 0.0)
        pytest.skip(f"this transformers gives it a {type(expected.past_key_values).__name__}")


@pytest.mark.parametrize("name", NAMES)
def test_exact(name):
    """Greedy from a left-padded batch: one tier, and two tiers that both hold tokens."""
    model = tiny_model(name)
    expected = run(model, INPUTS, new=6)
    skip_if_inert(model, expected)
    for settings in (ONE_TIER, TWO_TIERS):
        with scout_hf.patch(model, **settings) as handle:
            got = run(model, INPUTS, new=6)
            assert isinstance(got.past_key_values, ScoutCache) and got.past_key_values.scout_layers
            assert handle.stats().steps == 5
            assert settings is ONE_TIER or handle.stats().cpu_ratio > 0.2
        assert_exact(got, expected)
    assert_exact(run(model, INPUTS, new=6), expected, 0.0)


def layer_inputs(model, family):
    """The hidden states that each layer gets in one plain forward pass."""
    seen = []
    layers = family.layers(family.decoder(model))
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())) for layer in layers]
    with torch.no_grad():
        model(prompt(1, 12))
    [hook.remove() for hook in hooks]
    return seen


PREDICTS = TWO_TIERS | {"layer_ahead": True, "cpu_query": "predicted"}


@pytest.mark.parametrize("name", NAMES)
def test_exact_with_prediction(name, monkeypatch):
    """The predicted query decides what the CPU attends to; where it is the true one, nothing may change."""
    if name in NEVER_SILENT:
        pytest.skip("its residual stream is normalised or mixed")
    if name in UNPREDICTED:
        pytest.skip("its query is not predicted")
    model = tiny_model(name)
    family = family_of(model)
    last = silence(model, family)
    inputs = layer_inputs(model, family)
    assert all(torch.equal(inputs[0], hidden) for hidden in inputs[1 : last + 1])
    expected = run(model, INPUTS, new=6)
    skip_if_inert(model, expected)
    with scout_hf.patch(model, **PREDICTS) as handle:
        assert_exact(run(model, INPUTS, new=6), expected)
        stats = handle.stats()
        assert stats.cpu_ratio > 0.2 and stats.cosine > 0.9999 and not stats.exact
        real = type(family).query
        monkeypatch.setattr(type(family), "query", lambda *args, **kwargs: -real(*args, **kwargs))
        handle.reset_stats()
        assert relative_error(run(model, INPUTS, new=6), expected) > 1e-3
        assert handle.stats().cosine < -0.9999


def test_real_query_on_the_cpu_ignores_a_wrong_prediction(monkeypatch):
    """cpu_query="real", everything selected: the prediction may be as wrong as it likes."""
    model = tiny_model("llama")
    expected = run(model, INPUTS)
    family = type(family_of(model))
    real = family.query
    monkeypatch.setattr(family, "query", lambda *args, **kwargs: -real(*args, **kwargs))
    with scout_hf.patch(model, **PREDICTS | {"cpu_query": "real"}):
        assert_exact(run(model, INPUTS), expected)


def test_first_layer_after_a_sliding_one_is_predicted():
    """Alternating models predict from the stock layer just before; only layers 1 and 3 are scout layers."""
    model = tiny_model("qwen2_sliding")
    with scout_hf.patch(model, **PREDICTS) as handle:
        cache = run(model, INPUTS).past_key_values
        assert [isinstance(layer, ScoutLayer) for layer in cache.layers] == [False, True, False, True]
        assert [layer.layer for layer in handle.stats().layers] == [1, 3]
        assert all(layer.cosine is not None for layer in handle.stats().layers)
        assert handle.stats().kv_bytes["stock"] > 0


def test_multimodal_model():
    model = tiny_gemma3_multimodal()
    expected = run(model, INPUTS, new=6)
    for settings in (ONE_TIER, TWO_TIERS):
        with scout_hf.patch(model, **settings):
            got = run(model, INPUTS, new=6)
            assert isinstance(got.past_key_values, ScoutCache)
            assert_exact(got, expected)


def test_nothing_to_do_for_a_model_of_sliding_layers_only():
    model = tiny_model("mistral", sliding_window=16)
    expected = run(model, INPUTS)
    with scout_hf.patch(model), pytest.warns(UserWarning, match="nothing for scout_hf to do"):
        assert_exact(run(model, INPUTS), expected, 0.0)


# -- unknown families ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])
def test_unknown_family_is_exact(settings):
    model = unknown()
    assert isinstance(family_of(model), ProbeFamily)
    expected = run(model, INPUTS)
    with scout_hf.patch(model, **settings) as handle:
        assert handle.stats().steps == 0
        assert_exact(run(model, INPUTS), expected)


def test_unknown_family_is_predicted():
    """The probe and Llama's own file agree to the bit, and with each other under the construction."""
    model, known = unknown(), llama(initializer_range=0.1)
    with scout_hf.patch(model, **PREDICTS) as handle, scout_hf.patch(known, **PREDICTS):
        assert_exact(run(model, INPUTS), run(known, INPUTS))
        assert handle.stats().cosine is not None
    silence(model, ProbeFamily())
    expected = run(model, INPUTS)
    with scout_hf.patch(model, **PREDICTS) as handle:
        assert_exact(run(model, INPUTS), expected)
        assert handle.stats().cosine > 0.9999


def test_unknown_family_that_changes_keys_is_refused(monkeypatch):
    """Its attention works on the whole of K between the cache and the attention call."""
    model = unknown()
    interface = modeling_llama.ALL_ATTENTION_FUNCTIONS
    before = snapshot(model)

    class Changing(type(interface)):
        def get_interface(self, *args):
            real = interface.get_interface(*args)
            return lambda module, query, key, value, *rest, **kw: real(module, query, key * 1.0, value, *rest, **kw)

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Changing())
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM.*unknown family.*changes keys"):
        scout_hf.patch(model)
    assert snapshot(model) == before


def test_unknown_family_with_other_logits_is_refused(monkeypatch):
    """A bias on the scores that reaches no other argument: the trial run sees that the answer differs."""
    model = unknown()
    before = snapshot(model)
    layer = model.model.layers[1]
    real = layer.forward

    def forward(hidden_states, *args, **kwargs):
        cache = given_cache(kwargs)
        if cache is not None and cache.get_seq_length(1):
            hidden_states = hidden_states + 1.0
        return real(hidden_states, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", forward)
    with pytest.raises(UnsupportedModelError, match="logits differ by.*use it unpatched"):
        scout_hf.patch(model)
    monkeypatch.undo()
    assert snapshot(model) == before


# -- refused models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["deepseek_v4", "gemma4_assistant", "diffllama", "doge"])
def test_refused_family(model_type):
    model = llama()
    model.config = copy.deepcopy(model.config)
    model.config.model_type = model_type
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=f"{model_type}.*not supported: .*[Uu]se "):
        scout_hf.patch(model)
    assert snapshot(model) == before
    assert run(model, prompt()).sequences.shape == (1, 60)


def small_bert():
    return AutoModel.from_config(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50))


def small_t5():
    return AutoModelForSeq2SeqLM.from_config(T5Config(d_model=16, num_layers=1, d_kv=8, num_heads=2, vocab_size=50))


@pytest.mark.parametrize(
    "make, said",
    [
        (small_bert, "BertModel cannot generate"),
        (small_t5, "encoder-decoder"),
        (lambda: torch.nn.Linear(2, 2), "Linear, which is no transformers model"),
        (lambda: "meta-llama/Llama-3.2-1B", "string 'meta-llama.*from_pretrained"),
        (lambda: None, "NoneType"),
        (lambda: llama().model, "LlamaModel cannot generate.* Use LlamaForCausalLM, .*AutoModelForCausalLM"),
        (lambda: LlamaForCausalLM, r"the class LlamaForCausalLM, .* LlamaForCausalLM\.from_pretrained"),
    ],
)
def test_not_a_causal_language_model(make, said):
    with pytest.raises(UnsupportedModelError, match=said):
        scout_hf.patch(make())
