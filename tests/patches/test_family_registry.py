"""Which model gets which family, and what is refused with which words."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from scout_hf import errors
from scout_hf.patches import Family, ProbeFamily, family_of, register_family, registry
from scout_hf.patches.refused import REFUSED
from scout_hf.patches.unpredicted import Unpredicted
from tests.patches.tiny import tiny_config, tiny_gemma3_multimodal, tiny_model

REQUIRED = [
    "llama",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "mixtral",
    "phi3",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gpt_oss",
    "gpt_neox",
    "opt",
    "granite",
]


@pytest.fixture
def clean_registry(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))


@pytest.mark.parametrize("model_type", REQUIRED)
def test_required_types_are_handwritten(model_type):
    assert model_type in registry._FAMILIES
    assert type(registry._FAMILIES[model_type]) not in (Family, ProbeFamily, Unpredicted)


def test_no_type_is_both_served_and_refused():
    assert not set(registry._FAMILIES) & set(REFUSED)


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_refused_types_say_why_and_what_works(model_type):
    assert "Use the model unpatched" in REFUSED[model_type] and len(REFUSED[model_type]) > 150


class Mine(Family):
    model_types = ("my_model", "my_model_moe")


def test_register_and_replace(clean_registry):
    family = Mine()
    register_family(family)
    assert registry._FAMILIES["my_model"] is registry._FAMILIES["my_model_moe"] is family
    with pytest.raises(errors.ConfigError, match="'my_model' by Mine.*replace=True"):
        register_family(Mine())
    other = Mine()
    register_family(other, replace=True)
    assert registry._FAMILIES["my_model"] is other


def test_a_clash_registers_nothing(clean_registry):
    class Clash(Family):
        model_types = ("brand_new", "llama")

    with pytest.raises(errors.ConfigError, match="'llama' by Llama"):
        register_family(Clash())
    assert "brand_new" not in registry._FAMILIES


@pytest.mark.parametrize("names", [(), "llama", ("",), ("  ",), (3,), ["llama"], None])
def test_bad_names_are_refused(clean_registry, names):
    class Bad(Family):
        model_types = names

    with pytest.raises(errors.ConfigError, match="model_types must be a tuple"):
        register_family(Bad())


def test_a_class_in_place_of_an_instance(clean_registry):
    with pytest.raises(errors.ConfigError, match=r"Pass an instance: add \(\)"):
        register_family(Mine)
    with pytest.raises(errors.ConfigError, match="takes an instance"):
        register_family("llama")


def test_a_registered_family_wins_over_the_refusal(clean_registry, monkeypatch):
    monkeypatch.setitem(REFUSED, "llama", "just because.")
    model = tiny_model("llama")
    assert not isinstance(family_of(model), ProbeFamily)
    del registry._FAMILIES["llama"]
    with pytest.raises(errors.UnsupportedModelError, match="LlamaForCausalLM .model type 'llama'.*just because"):
        family_of(model)


def test_models_of_refused_types():
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=1, vocab_size=8, state_size=4)
    from transformers import MambaForCausalLM

    with pytest.raises(errors.UnsupportedModelError, match="nothing to offload"):
        family_of(MambaForCausalLM(config))


def test_multimodal_model_goes_by_its_text_decoder():
    assert family_of(tiny_gemma3_multimodal()) is registry._FAMILIES["gemma3_text"]


class Wrapper(nn.Module):
    """Forwards attributes to the wrapped model, as PEFT's models do."""

    def __init__(self, model, with_getter):
        super().__init__()
        self.model = model
        if with_getter:
            self.get_base_model = lambda: model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


@pytest.mark.parametrize("with_getter", [False, True])
def test_wrapped_models_are_looked_through(with_getter):
    model = tiny_model("qwen3")
    assert family_of(Wrapper(model, with_getter)) is family_of(model)


BERT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=16)


def unsupported():
    def tiny_t5():
        return T5ForConditionalGeneration(
            T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=16)
        )

    def tiny_bart():
        return BartForConditionalGeneration(
            BartConfig(
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                vocab_size=16,
                max_position_embeddings=32,
                forced_eos_token_id=2,
            )
        )

    def head():
        config = tiny_config("llama")
        config.num_labels = 2
        return LlamaForSequenceClassification(config)

    def layerless():
        model = tiny_model("llama")
        del model.model.layers
        return model

    yield "string", lambda: "meta-llama/Llama-3.1-8B", "from_pretrained.'meta-llama/Llama-3.1-8B'"
    yield "none", lambda: None, "got NoneType, which is no transformers model"
    yield "linear", lambda: nn.Linear(2, 2), "got Linear, which is no transformers model"
    yield "parallel", lambda: nn.DataParallel(tiny_model("llama")), "DataParallel.*model.module"
    yield "t5", tiny_t5, "T5ForConditionalGeneration is an encoder-decoder"
    yield "bart", tiny_bart, "BartForConditionalGeneration is an encoder-decoder"
    yield "bert", lambda: BertForMaskedLM(BertConfig(**BERT)), "BertForMaskedLM cannot generate"
    yield "classifier", head, "LlamaForSequenceClassification cannot generate"
    yield "headless", lambda: LlamaModel(tiny_config("llama")), "LlamaModel cannot generate.* Use LlamaForCausalLM"
    yield "class", lambda: LlamaForCausalLM, "got the class LlamaForCausalLM, need a loaded model"
    yield (
        "bloom",
        lambda: BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=16)),
        "'bloom'.*computes attention itself",
    )
    yield "layerless", layerless, "LlamaModel has no `layers` to hook into"


@pytest.mark.parametrize("make, message", [case[1:] for case in unsupported()], ids=[c[0] for c in unsupported()])
def test_what_is_no_causal_lm_is_refused_by_name(make, message):
    with pytest.raises(errors.UnsupportedModelError, match=message) as caught:
        family_of(make())
    assert isinstance(caught.value, errors.ScoutError)


def test_unpredicted_types_run_without_prediction():
    config = AutoConfig.for_model(
        "llama4_text",
        hidden_size=64,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=16,
        num_local_experts=2,
        pad_token_id=0,
    )
    from transformers import Llama4ForCausalLM

    model = Llama4ForCausalLM(config)
    family = family_of(model)
    assert type(family) is Unpredicted
    decoder = family.decoder(model)
    layers = family.layers(decoder)
    assert len(layers) == 2 and not family.available(layers[1])
    with pytest.raises(errors.UnsupportedModelError, match="available"):
        family.query(decoder, layers[1], torch.zeros(1, 1, 64))
