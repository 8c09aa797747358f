"""Attention implementations and dtypes that differ from what the cache was filled with."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

import scout_hf
from tests.patches.tiny import tiny_model

IDS = torch.randint(1, 60, (1, 60), generator=torch.Generator().manual_seed(0))


def test_a_custom_implementation_with_sinks():
    """Its own masks are unknown: the prompt goes through eager attention, which knows sinks; sdpa would drop them."""
    AttentionInterface.register("custom_for_this_test", eager_attention_forward)
    AttentionMaskInterface.register("custom_for_this_test", eager_mask)
    model = tiny_model("gpt_oss")
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(std=2)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "custom_for_this_test"
    with torch.no_grad():
        stock = model(IDS).logits
        with scout_hf.patch(model, budget=None, attention="sdpa") as handle:
            ours = model(IDS, past_key_values=handle.new_cache()).logits
    torch.testing.assert_close(ours, stock, atol=3e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize(
    "settings", [{"cpu_query": "predicted"}, {"cpu_query": "auto"}, {"cpu_query": "real"}, {"layer_ahead": False}]
)
def test_decoding_under_autocast_after_a_prompt_without(name, settings):
    model = tiny_model(name)
    options = dict(budget=32, block_size=8, split="cpu", window=8, resident=16)
    with scout_hf.patch(model, **options | settings) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(IDS, past_key_values=cache)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                assert model(IDS[:, :1], past_key_values=cache).logits.isfinite().all()


def test_frozen_weights_with_learnt_inputs_are_refused():
    model = tiny_model("llama").requires_grad_(False)
    learnt = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with scout_hf.patch(model) as handle:
        with pytest.raises(scout_hf.UnsupportedInputError, match="no gradients"):
            model(inputs_embeds=learnt, past_key_values=handle.new_cache())
        assert model(IDS, past_key_values=handle.new_cache()).logits.isfinite().all()


def test_reset_makes_a_broken_cache_whole():
    model = tiny_model("llama")
    cache = scout_hf.ScoutCache(model.config)
    cache.guard.torn = "crop()"
    with pytest.raises(scout_hf.CacheStateError, match="new ScoutCache"):
        cache.mark()
    cache.reset()
    assert cache.mark() == [None] * model.config.num_hidden_layers
