"""A returned ScoutCache reads as a DynamicCache does: keys and values per layer, iteration, a stock copy."""

import copy

import pytest
import torch
from transformers import DynamicCache

import scout_hf
from scout_hf import ScoutCache
from scout_hf.compat.cache_names import CACHE
from tests.integration.common import (
    EXACT_METHODS,
    LOSSY,
    ONE_TIER,
    TWO_TIERS,
    assert_close,
    assert_equal,
    left_padded,
    llama,
    prompt,
    run,
)
from tests.patches.tiny import own_cache, tiny_model

SETTINGS = {"one tier": ONE_TIER, "two tiers": TWO_TIERS, **EXACT_METHODS}
INT8 = {"one tier": ONE_TIER | {"host_dtype": "int8"}, "two tiers": TWO_TIERS | {"host_dtype": "int8"}}
EVERY = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def filled(settings, model=None, inputs=None, new=10):
    """The caches of a patched and of the stock model after the same call."""
    model, inputs = model or llama(), prompt() if inputs is None else inputs
    stock = run(model, inputs, new)[CACHE]
    with scout_hf.patch(model, **settings):
        return run(model, inputs, new)[CACHE], stock


def random_cache(settings, tokens=30, rows=2, layers=3):
    """Filled through ``update``, and what it was filled with."""
    cache, made = ScoutCache(llama().config, **settings), torch.Generator().manual_seed(0)
    given = torch.randn(layers, 2, rows, 2, tokens, 8, generator=made)
    for index in range(layers):
        cache.update(*given[index], index)
    return cache, given


@EVERY
def test_keys_and_values_are_those_of_the_stock_cache(settings):
    cache, stock = filled(settings, inputs=left_padded(0, 5))
    assert isinstance(cache, ScoutCache) and len(cache) == len(stock)
    for ours, theirs in zip(cache.layers, stock.layers, strict=True):
        for name in ("keys", "values"):
            got, expected = getattr(ours, name), getattr(theirs, name)
            assert got.shape == expected.shape == (2, 2, 59, 8) and got.is_contiguous()
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert (ours.device, ours.keys.dtype) == (theirs.device, theirs.keys.dtype)
    assert cache.is_initialized and cache.is_sliding == stock.is_sliding
    assert getattr(cache, "batch_size", None) == getattr(stock, "batch_size", None)


@pytest.mark.parametrize("settings", INT8.values(), ids=INT8)
def test_what_the_host_keeps_in_int8_reads_in_the_models_dtype(settings):
    cache, given = random_cache(settings)
    keys, values = cache.layers[1].keys, cache.layers[1].values
    assert keys.dtype == values.dtype == torch.float32
    torch.testing.assert_close(torch.stack([keys, values]), given[1], atol=0.03, rtol=0)
    assert not torch.equal(keys, given[1, 0])


@EVERY
def test_iteration_is_that_of_dynamic_cache(settings):
    cache, stock = filled(settings)
    for ours, theirs in zip(cache, stock, strict=True):
        assert len(ours) == len(theirs) and ours[2] is theirs[2] is None
        for got, expected in zip(ours[:2], theirs[:2]):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    made = DynamicCache(cache)
    assert made.get_seq_length() == 59
    assert all(torch.equal(new.keys, old.keys) for new, old in zip(made.layers, cache.layers, strict=True))


@EVERY
def test_an_empty_layer_reads_as_a_stock_one(settings):
    cache, stock = ScoutCache(llama().config, **settings), DynamicCache(config=llama().config)
    assert [tuple(layer) for layer in cache] == [tuple(layer) for layer in stock]
    assert cache.layers[0].keys is None and not cache.is_initialized and not cache.layers[0].is_initialized
    assert not hasattr(cache.layers[0], "device")
    assert cache.to_dynamic().get_seq_length() == 0

    cache, _ = random_cache(settings)
    assert cache.is_initialized and cache.layers[0].is_initialized
    cache.reset()
    assert cache.layers[0].keys is cache.layers[0].values is None and not cache.is_initialized


@EVERY
def test_nothing_is_left_after_cropping_everything(settings):
    cache, given = random_cache(settings)
    cache.crop(-30)
    assert cache.layers[0].keys.shape == (2, 2, 0, 8) and not cache.is_initialized
    cache.update(*given[0, :, :, :, :9], 0)
    assert torch.equal(cache.layers[0].values, given[0, 1, :, :, :9]) and cache.is_initialized


@pytest.mark.parametrize("name", ["keys", "values", "is_initialized"])
def test_assigning_is_refused_with_the_reason(name):
    cache, given = random_cache(TWO_TIERS)
    with pytest.raises(scout_hf.CacheStateError, match=f"{name} of layer 2 .*to_dynamic"):
        setattr(cache.layers[2], name, given[0, 0])
    empty = ScoutCache(llama().config)
    with pytest.raises(scout_hf.CacheStateError, match=name):
        setattr(empty.layers[2], name, given[0, 0])
    with pytest.raises(scout_hf.CacheStateError, match=name):
        setattr(cache.layers[2], name, None)
    assert torch.equal(cache.layers[2].keys, given[2, 0])


@EVERY
def test_writing_into_what_was_read_reaches_no_cache(settings):
    """It cannot be refused, torch has no tensors that are read alone; what puts the result back is."""
    cache, given = random_cache(settings)
    layer = cache.layers[2]
    layer.keys[..., 3:, :] = 7.0
    layer.values[0].fill_(7.0)
    for name in ("keys", "values"):
        with pytest.raises(scout_hf.CacheStateError, match=f"{name} of layer 2 .*to_dynamic"):
            exec(f"layer.{name} *= 7")
    assert torch.equal(torch.stack([layer.keys, layer.values]), given[2])
    twin = cache.to_dynamic()
    twin.layers[2].keys[..., 3:, :] = 7.0
    assert (twin.layers[2].keys[..., 3:, :] == 7.0).all() and torch.equal(layer.keys, given[2, 0])


@EVERY
@pytest.mark.parametrize("tokens", [5, 30])
def test_what_was_read_is_the_readers_own(settings, tokens):
    cache, given = random_cache(settings, tokens)
    twin = cache.to_dynamic()
    read = [cache.layers[1].keys, cache.layers[1].values, twin.layers[1].keys, twin.layers[1].values]
    for tensor in read:
        tensor.zero_()
    assert torch.equal(torch.stack([cache.layers[1].keys, cache.layers[1].values]), given[1])
    for _ in range(20):
        cache.update(*given[1, :, :, :, :1], 1)
    assert not any(tensor.any() for tensor in read)


@EVERY
def test_a_stock_copy_continues_as_stock(settings):
    model, inputs = llama(), left_padded(0, 5)
    stock = run(model, inputs)
    with scout_hf.patch(model, **settings):
        cache = run(model, inputs)[CACHE]
    more = {
        "input_ids": torch.cat([stock.sequences, prompt(2, 7, seed=3)], dim=1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 17), value=1),
    }
    twin = cache.to_dynamic()
    assert type(twin) is DynamicCache
    got = run(model, more, **{CACHE: twin})
    assert got[CACHE] is twin and cache.get_seq_length() == 59
    assert_close(got, run(model, more, **{CACHE: stock[CACHE]}), 1e-5)


@pytest.mark.parametrize("family", ["qwen2_sliding", "gemma3", "qwen3_next"])
def test_layers_left_to_transformers_are_copied_too(family):
    if reason := own_cache(family):
        pytest.skip(reason)
    model, ids = tiny_model(family), prompt()
    stock = run(model, ids, 20)
    with scout_hf.patch(model, **TWO_TIERS):
        cache = run(model, ids, 20)[CACHE]
    before = copy.deepcopy(cache)
    twin = cache.to_dynamic()
    assert [type(layer) for layer in twin.layers] == [type(layer) for layer in DynamicCache(config=model.config).layers]
    more = torch.cat([stock.sequences, prompt(1, 7, seed=3)], dim=1)
    got, expected = run(model, more, **{CACHE: twin}), run(model, more, **{CACHE: stock[CACHE]})
    assert_close(got, expected, 5e-5)
    # The ScoutCache has not moved.
    with scout_hf.patch(model, **TWO_TIERS):
        runs = [run(model, more, **{CACHE: held}) for held in (cache, before)]
    assert_equal(*runs)


def test_sliding_layers_iterate_as_they_do_in_stock():
    model = tiny_model("qwen2_sliding")
    cache, stock = filled(TWO_TIERS, model, prompt())
    for ours, theirs in zip(cache, stock, strict=True):
        assert (ours[2] is None) == (theirs[2] is None)
        assert ours[2] is None or torch.equal(ours[2], theirs[2])
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=0)


def test_reading_in_the_middle_of_a_pass_changes_nothing():
    """Jobs of two tiers, prediction and recall are in flight while a user's hook reads every layer."""
    model = llama()
    with scout_hf.patch(model, **LOSSY) as handle:
        expected = run(model, prompt(), 20)
        cache, seen = handle.new_cache(), []

        def look(*_):
            seen.append([None if layer.keys is None else layer.keys.shape[2] for layer in cache.layers])
            repr(cache)

        hooks = [layer.register_forward_hook(look) for layer in model.model.layers]
        got = run(model, prompt(), 20, **{CACHE: cache})
        for hook in hooks:
            hook.remove()
    assert_equal(got, expected)
    assert seen[0] == [50, None, None] and seen[-2] == [69, 69, 68]


READS = {
    "iterate": lambda cache: next(iter(cache))[0],
    "layer": lambda cache: cache.layers[0].keys,
    "copy": lambda cache: cache.to_dynamic().layers[0].keys,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_after_an_interrupt_what_was_there_before_is_read(read):
    model, ids = llama(), prompt()

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad(), scout_hf.patch(model, **TWO_TIERS) as handle:
        cache = handle.new_cache()
        model(ids, **{CACHE: cache})
        before = cache.layers[0].keys
        hook = model.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, :1], **{CACHE: cache})
        hook.remove()
        assert torch.equal(read(cache), before)
        assert {layer.get_seq_length() for layer in cache.layers} == {50}


def test_reading_under_inference_mode():
    cache, given = random_cache(TWO_TIERS)
    with torch.inference_mode():
        twin, keys = cache.to_dynamic(), cache.layers[0].keys
    twin.layers[0].keys.mul_(2)
    keys.mul_(2)
    assert torch.equal(keys, 2 * given[0, 0]) and torch.equal(twin.layers[0].keys, keys)


def test_a_cache_that_cannot_go_back_is_not_copied():
    cache, _ = random_cache(ONE_TIER)
    cache.guard.torn = "crop()"
    with pytest.raises(scout_hf.CacheStateError, match="new ScoutCache"):
        cache.to_dynamic()


def test_repr_says_what_is_held():
    cache, _ = random_cache(TWO_TIERS | {"budget": 512})
    text = repr(cache)
    held = cache.tier_bytes()
    assert "30 tokens" in text and "2 rows" in text and "3 layers" in text and held["host"] > 0
    assert "method='scout'" in text and "budget=512" in text and str(held) in text
    assert repr(cache.layers[2]) == "ScoutLayer(2, 30 tokens)"
    empty = repr(ScoutCache(llama().config, budget=None))
    assert " 0 tokens" in empty and "budget=None" in empty and "row" not in empty and "mass" not in empty
    assert "budget=512, mass=0.9, 0 tokens" in repr(ScoutCache(llama().config, budget=512, mass=0.9))


def test_repr_tells_layers_left_to_transformers():
    with pytest.warns(UserWarning, match="nothing for scout_hf"):
        none = ScoutCache(tiny_model("qwen2_sliding", layer_types=["sliding_attention"] * 4).config)
    assert "0 of 4 layers" in repr(none)
    cache, _ = filled(ONE_TIER, tiny_model("qwen2_sliding"))
    assert "2 of 4 layers" in repr(cache) and "59 tokens" in repr(cache) and "'stock'" in repr(cache)
