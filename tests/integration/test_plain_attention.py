"""Attention that is not known to be plain is refused by name, or taken for plain in prompts and decode steps alike."""

import functools

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import scout_hf
from scout_hf import PatchError, ScoutCache, UnsupportedModelError
from scout_hf.compat.cache_names import CACHE
from tests.integration.common import ONE_TIER, TWO_TIERS, assert_close, assert_equal, llama, prompt, run
from tests.integration.models import snapshot
from tests.patches.tiny import tiny_model

SHARP = "sharp_for_this_test"


def sharp(module, query, key, value, attention_mask, **kwargs):
    """Attention that is not plain: twice as sharp."""
    return sdpa_attention_forward(module, 2 * query, key, value, attention_mask, **kwargs)


@functools.wraps(sdpa_attention_forward)
def sharp_in_disguise(module, query, *args, **kwargs):
    """Says that it is of transformers."""
    return sdpa_attention_forward(module, 2 * query, *args, **kwargs)


@functools.wraps(modeling_llama.eager_attention_forward)
def sharp_eager(module, query, *args, **kwargs):
    return STOCK_EAGER(module, 2 * query, *args, **kwargs)


STOCK_EAGER = modeling_llama.eager_attention_forward


def small(implementation="sdpa"):
    model = llama(num_hidden_layers=2)
    model.config._attn_implementation = implementation
    return model


@pytest.fixture
def registered(monkeypatch):
    """The name of an attention function of a user, with masks."""
    monkeypatch.setitem(AttentionInterface._global_mapping, SHARP, sharp)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, SHARP, sdpa_mask)
    return SHARP


def replace_sdpa(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sharp)


def replace_sdpa_here(monkeypatch):
    """As kvpress does: for the one table that all models read."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", sharp_in_disguise)


def replace_masks(monkeypatch):
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", lambda **given: sdpa_mask(**given))


def replace_eager(monkeypatch):
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", sharp_eager)


def register_eager(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "eager", sharp)


REPLACED = {
    "sdpa registered again": (replace_sdpa, "sdpa", "sharp"),
    "sdpa replaced in a table": (replace_sdpa_here, "sdpa", "sharp"),
    "masks of sdpa": (replace_masks, "sdpa", "mask function"),
    "eager of the model's file": (replace_eager, "eager", "eager"),
    "eager registered": (register_eager, "eager", "sharp"),
}


class TestRefused:
    def test_a_registered_function(self, registered):
        model = small(registered)
        before = snapshot(model)
        with pytest.raises(UnsupportedModelError, match=f"LlamaAttention.*'{SHARP}'.*attention='sdpa'"):
            scout_hf.patch(model, **ONE_TIER)
        assert snapshot(model) == before

    @pytest.mark.parametrize("way", REPLACED)
    def test_a_replaced_function(self, monkeypatch, way):
        replace, implementation, named = REPLACED[way]
        model = small(implementation)
        replace(monkeypatch)
        before = snapshot(model)
        with pytest.raises(UnsupportedModelError, match=f"{named}.*{__name__}.*attention='sdpa'"):
            scout_hf.patch(model, **ONE_TIER)
        assert snapshot(model) == before

    def test_a_kernel_that_is_no_flash_attention(self, monkeypatch):
        monkeypatch.setitem(AttentionInterface._global_mapping, "somebody/some-kernel", sharp)
        with pytest.raises(UnsupportedModelError, match="somebody/some-kernel"):
            scout_hf.patch(small("somebody/some-kernel"), **ONE_TIER)

    def test_the_attention_class_of_a_known_family_with_a_forward_of_its_own(self, monkeypatch):
        """It is tried on a few tokens, as unknown families are."""
        stock = modeling_llama.LlamaAttention.forward

        def plain(self, hidden_states, *args, **kwargs):
            return stock(self, hidden_states, *args, **kwargs)

        def other(self, hidden_states, *args, **kwargs):
            out, weights = stock(self, hidden_states, *args, **kwargs)
            return (out * 2 if kwargs.get(CACHE) is None else out), weights

        monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", plain)
        expected = run(small(), prompt())
        model = small()
        with scout_hf.patch(model, **TWO_TIERS):
            assert_close(run(model, prompt()), expected)
        monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", other)
        with pytest.raises(UnsupportedModelError, match="logits differ"):
            scout_hf.patch(small(), **TWO_TIERS)

    def test_gpt2_that_upcasts_in_eager_attention(self):
        model = tiny_model("gpt2", reorder_and_upcast_attn=True)
        model.set_attn_implementation("eager")
        with pytest.raises(UnsupportedModelError, match="reorder_and_upcast_attn.*sdpa"):
            scout_hf.patch(model, **ONE_TIER)
        model.set_attn_implementation("sdpa")
        with scout_hf.patch(model, **ONE_TIER):
            run(model, prompt())
            model.set_attn_implementation("eager")
            with pytest.raises(PatchError, match="reorder_and_upcast_attn"):
                run(model, prompt())

    @pytest.mark.parametrize("value", ["eager", None, "plain", True])
    def test_another_value_of_the_option(self, value):
        with pytest.raises(scout_hf.ConfigError, match="attention=.*'auto' or 'sdpa'"):
            scout_hf.patch(small(), attention=value)


class TestKnown:
    def test_a_model_that_subclasses_attention_elsewhere(self):
        """Its eager function is that of the base class's file."""

        class Mine(modeling_llama.LlamaAttention):
            pass

        model, stock = small("eager"), small("eager")
        for layer in model.model.layers:
            layer.self_attn.__class__ = Mine
        with scout_hf.patch(model, **TWO_TIERS):
            assert_close(run(model, prompt()), run(stock, prompt()))
            assert_equal(run(model, prompt(), use_cache=False), run(stock, prompt(), use_cache=False))

    @pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"])
    def test_flash_attention(self, monkeypatch, name):
        flash = ALL_ATTENTION_FUNCTIONS["flash_attention_2"]
        monkeypatch.setitem(AttentionInterface._global_mapping, name, flash)
        with scout_hf.patch(small(name), **ONE_TIER) as handle:
            assert handle.exact


class TestTakenForPlain:
    """With attention='sdpa', prompts and decode steps follow one rule, that of plain attention."""

    def test_a_registered_function(self, registered):
        model = small(registered)
        sharp_forward = run(model, prompt(), use_cache=False)
        with scout_hf.patch(model, attention="sdpa", **TWO_TIERS):
            output = run(model, prompt())
            assert isinstance(output[CACHE], ScoutCache)
            assert_close(output, run(small("sdpa"), prompt()))
            assert_equal(run(model, prompt(), use_cache=False), sharp_forward)
        assert model.config._attn_implementation == SHARP

    def test_a_function_registered_without_masks(self, monkeypatch):
        """Stock passes get no mask, as before."""
        monkeypatch.setitem(AttentionInterface._global_mapping, SHARP, sharp)
        model = small(SHARP)
        stock = run(model, prompt(), use_cache=False)
        with scout_hf.patch(model, attention="sdpa", **ONE_TIER):
            assert_equal(run(model, prompt(), use_cache=False), stock)
            assert_close(run(model, prompt()), run(small("sdpa"), prompt()))

    @pytest.mark.parametrize("way", REPLACED)
    def test_a_replaced_function(self, monkeypatch, way):
        replace, implementation, _ = REPLACED[way]
        expected = run(small(implementation), prompt())
        replace(monkeypatch)
        model = small(implementation)
        with scout_hf.patch(model, attention="sdpa", **TWO_TIERS):
            assert_close(run(model, prompt()), expected)

    def test_plain_attention_is_what_it_was(self):
        model = small("eager")
        stock = run(model, prompt())
        with scout_hf.patch(model, attention="sdpa", **TWO_TIERS):
            assert_close(run(model, prompt()), stock)


class TestChangedLater:
    @pytest.mark.parametrize("way", REPLACED)
    def test_a_function_replaced_after_patch_is_noticed(self, monkeypatch, way):
        replace, implementation, named = REPLACED[way]
        model = small(implementation)
        stock = run(model, prompt())
        with scout_hf.patch(model, **ONE_TIER) as handle:
            cache = run(model, prompt())[CACHE]
            held = cache.get_seq_length()
            with monkeypatch.context() as later:
                replace(later)
                for options in ({}, {CACHE: cache}):
                    with pytest.raises(PatchError, match=f"changed after patch.*{named}"), torch.no_grad():
                        model(prompt(tokens=1), **({CACHE: handle.new_cache()} | options))
                assert cache.get_seq_length() == held
            assert_close(run(model, prompt()), stock)

    def test_a_name_set_after_patch_is_noticed(self, registered):
        model = small()
        with scout_hf.patch(model, **ONE_TIER):
            model.set_attn_implementation(registered)
            with pytest.raises(PatchError, match=f"changed after patch.*'{SHARP}'.*attention='sdpa'"):
                run(model, prompt())
            model.set_attn_implementation("sdpa")
            assert_close(run(model, prompt()), run(small(), prompt()))

    def test_functions_of_scout_hf_that_were_overwritten(self, monkeypatch):
        """Who loads a kernel registers it under the name that the config has."""
        model = small()
        with scout_hf.patch(model, **TWO_TIERS):
            AttentionInterface.register(model.config._attn_implementation, sharp)
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
            assert_close(run(model, prompt()), run(small(), prompt()))
