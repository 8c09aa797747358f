"""ScoutCache without a patched model around it: as DynamicCache, and on to a patched model and back."""

import gc
import weakref

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import scout_hf
from scout_hf import CacheStateError, ScoutCache
from tests.integration.common import ONE_TIER, TWO_TIERS, assert_close, left_padded, llama, prompt, run
from tests.patches.tiny import tiny_model

TIERS = pytest.mark.parametrize("settings", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])
MODES = {
    "greedy": (prompt(), {}),
    "padded": (left_padded(0, 5, 21), {"new": 20}),
    "beam": (left_padded(0, 5), {"num_beams": 3}),
    "prompt lookup": (torch.cat([prompt(1, 12)] * 3, dim=1), {"prompt_lookup_num_tokens": 4, "new": 14}),
    "chunks": (prompt(), {"prefill_chunk_size": 16}),
}


@TIERS
@pytest.mark.parametrize("mode", MODES)
def test_unpatched_model(settings, mode):
    model = llama()
    inputs, options = MODES[mode]
    expected = run(model, inputs, **options)
    got = run(model, inputs, past_key_values=ScoutCache(model.config, **settings), **options)
    assert isinstance(got.past_key_values, ScoutCache)
    assert_close(got, expected)


def test_unpatched_model_with_a_sparse_budget():
    """Unpatched means everything is attended, whatever the budget."""
    model = llama()
    cache = ScoutCache(model.config, budget=16, block_size=8, split="cpu")
    assert_close(run(model, prompt(), past_key_values=cache), run(model, prompt()))


def test_unpatched_hybrid_model():
    model = tiny_model("qwen2_sliding")
    cache = ScoutCache(model.config, **TWO_TIERS)
    assert_close(run(model, prompt(), past_key_values=cache), run(model, prompt()), 2e-5)


@TIERS
def test_a_conversation_across_patching(settings):
    """Turns alternate between the stock and the patched model, on one cache."""
    model = llama()
    expected = got = run(model, prompt(), past_key_values=None)
    cache = ScoutCache(model.config, **settings)
    got = run(model, prompt(), past_key_values=cache)
    assert_close(got, expected)
    for turn in range(4):
        ids = torch.cat([expected.sequences, prompt(1, 11, seed=turn)], dim=1)
        expected = run(model, ids)
        if turn % 2 == 0:
            with scout_hf.patch(model, **settings) as handle:
                got = run(model, ids, past_key_values=cache)
                assert handle.stats().steps > 0
        else:
            got = run(model, ids, past_key_values=cache)
        assert_close(got, expected)


@TIERS
@pytest.mark.parametrize("rows", [1, 3])
def test_update_is_that_of_dynamic_cache(settings, rows):
    config = llama().config
    caches = DynamicCache(config=config), ScoutCache(config, **settings)
    made = torch.Generator().manual_seed(0)
    for tokens in (30, 1, 1, 7, 8, 16, 1, 5):
        for index in range(3):
            keys, values = torch.randn(2, rows, 2, tokens, 8, generator=made)
            expected, got = (cache.update(keys.clone(), values.clone(), index) for cache in caches)
            assert all(torch.equal(a, b) for a, b in zip(got, expected))
        lengths = [[cache.get_seq_length(index) for index in range(3)] for cache in caches]
        assert lengths[0] == lengths[1] and caches[0].get_mask_sizes(2, 0) == caches[1].get_mask_sizes(2, 0)


@TIERS
def test_filled_directly_then_decoded(settings):
    """What benchmarks do: no prefill, keys and values from elsewhere."""
    model = llama()
    inputs = left_padded(0, 5)
    with torch.no_grad():
        stock = model(**inputs, use_cache=True).past_key_values
    token = {
        "input_ids": prompt(2, 1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1),
    }
    cache = ScoutCache(model.config, **settings)
    for index, layer in enumerate(stock.layers):
        for start in range(0, 50, 20):
            cache.update(layer.keys[:, :, start : start + 20], layer.values[:, :, start : start + 20], index)
    positions = token["attention_mask"].sum(-1, keepdim=True) - 1
    for step in range(12):
        options = token | {"position_ids": positions + step, "use_cache": True}
        with torch.no_grad(), scout_hf.patch(model, **settings):
            got = model(**options, past_key_values=cache).logits
        with torch.no_grad():
            expected = model(**options, past_key_values=stock).logits
        assert (got - expected).abs().max() <= 3e-6
        token["attention_mask"] = torch.nn.functional.pad(token["attention_mask"], (0, 1), value=1)


def test_update_keeps_no_graph():
    config = llama().config
    cache = ScoutCache(config, **ONE_TIER)
    keys = torch.randn(1, 2, 9, 8, requires_grad=True)
    cache.update(keys, keys * 2, 0)
    got, _ = cache.update(keys, keys * 2, 0)
    assert torch.equal(got[:, :, :9], keys) and torch.equal(got[:, :, 9:], keys)


def test_reset():
    model = llama()
    with scout_hf.patch(model, **TWO_TIERS) as handle:
        cache = handle.new_cache()
        expected = run(model, prompt(), past_key_values=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert_close(run(model, prompt(), past_key_values=cache), expected, 0.0)
        cache.reset()
        run(model, left_padded(0, 5), past_key_values=cache)


def test_windows_that_have_moved_on_refuse_a_crop_before_anything_changes():
    """Stock raises in the middle, when the layers before have been cropped."""
    model, ids = tiny_model("qwen2_sliding"), prompt(1, 40)
    expected = run(model, ids, new=6)
    with scout_hf.patch(model, **TWO_TIERS) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(ids[:, :39], past_key_values=cache, use_cache=True)
        for wanted in (-1, 20):
            with pytest.raises(CacheStateError, match=r"crop\(\): layers 0, 2 have a window .* nothing was changed"):
                cache.crop(wanted)
        cache.crop(39)  # nothing to take
        assert cache.get_seq_length() == 39 and cache.token_ids.tolist() == ids[:, :39].tolist()
        assert_close(run(model, ids, new=6, past_key_values=cache), expected)


@pytest.mark.parametrize("first", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize(("given", "kept"), [(0, 20), (7, 7), (30, 20), (-5, 15)])
def test_all_layers_are_cropped_alike_in_every_release(first, given, kept):
    """Some releases refuse a length to keep, of others 0 is one."""
    others = {"full_attention": "sliding_attention", "sliding_attention": "full_attention"}
    model = tiny_model("qwen2_sliding", layer_types=[first, others[first]] * 2, sliding_window=64)
    with scout_hf.patch(model) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(prompt(tokens=20)[:1], **{scout_hf.CACHE: cache})
        cache.crop(given)
    assert {layer.get_seq_length() for layer in cache.layers} == {kept}


@pytest.mark.parametrize(
    "options", [{}, {"split": "cpu"}, {"host_dtype": "int8"}, {"method": "hgca"}, {"method": "dense"}], ids=str
)
def test_a_prompt_s_own_keys_and_values_are_let_go(options):
    """Only their pages stay; what is as large as the prompt would double the memory."""
    cache = ScoutCache(llama().config, block_size=8, window=8, **options)
    # Torch holds an array as long as any tensor uses its memory.
    arrays = [np.random.default_rng(place).standard_normal((1, 2, 203, 8), dtype=np.float32) for place in range(2)]
    alive = [weakref.ref(array) for array in arrays]
    cache.layers[0].update(*map(torch.from_numpy, arrays))
    del arrays
    gc.collect()
    assert all(one() is None for one in alive)
