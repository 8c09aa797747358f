"""A cache that another model made or filled is refused before anything is stored, and still works with its own."""

import pytest
import torch

import scout_hf
from scout_hf.compat.cache_names import CACHE
from tests.integration.common import EXACT_METHODS, ONE_TIER, TOLERANCE, TWO_TIERS, llama, prompt

METHODS = {"one tier": ONE_TIER, "two tiers": TWO_TIERS, **EXACT_METHODS}
IDS = prompt(2, 60)


def forward(model, ids, cache=None):
    with torch.no_grad():
        return model(ids, **({} if cache is None else {CACHE: cache})).logits[:, -1]


def refused_and_unharmed(other, cache, match):
    """``other`` gets the cache, of ``IDS[:, :50]``, for a turn and for a decode step."""
    for tokens in (5, 1):
        held = [layer.get_seq_length() for layer in cache.layers]
        with pytest.raises(scout_hf.CacheStateError, match=match):
            forward(other, IDS[:, :tokens], cache)
        assert [layer.get_seq_length() for layer in cache.layers] == held


@pytest.mark.parametrize("filled", [True, False], ids=["filled", "empty"])
@pytest.mark.parametrize("depths", [(2, 4), (4, 2)], ids=["of fewer layers", "of more layers"])
@pytest.mark.parametrize("options", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])
def test_another_number_of_layers(options, depths, filled):
    model, other = (llama(num_hidden_layers=depth) for depth in depths)
    expected = forward(model, IDS)
    with scout_hf.patch(model, **options) as handle, scout_hf.patch(other, **options) as of_other:
        cache = handle.new_cache()
        if filled:
            forward(model, IDS[:, :50], cache)
        refused_and_unharmed(other, cache, f"of {depths[0]} layers.* one of {depths[1]}.*new_cache")
        assert of_other.stats().steps == 0
        assert (forward(model, IDS[:, 50 if filled else 0 :], cache) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "sizes", [{"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"head_dim": 32}], ids=lambda sizes: str(sizes)
)
def test_other_kv_heads_or_channels(name, sizes):
    """One KV head would be copied to all that the cache has, and no number would look wrong."""
    model, other = llama(), llama(**sizes)
    expected = forward(model, IDS)
    with scout_hf.patch(model, **METHODS[name]) as handle, scout_hf.patch(other, **METHODS[name]):
        cache = handle.new_cache()
        forward(model, IDS[:, :50], cache)
        refused_and_unharmed(other, cache, "layer 0 .* 2 KV heads with 8 channels and got .*new_cache")
        assert (forward(model, IDS[:, 50:], cache) - expected).abs().max() <= TOLERANCE


def test_a_cache_without_a_patched_model():
    model, other = llama(), llama(num_key_value_heads=1)
    cache = scout_hf.ScoutCache(model.config, **TWO_TIERS)
    forward(model, IDS[:, :50], cache)
    refused_and_unharmed(other, cache, "layer 0 .* 2 KV heads with 8 channels and got 1 with 8")


def test_keys_that_fit_with_values_that_do_not():
    cache = scout_hf.ScoutCache(llama().config, **TWO_TIERS)
    cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    with pytest.raises(scout_hf.CacheStateError, match="values"):
        cache.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 1), 0)
    with pytest.raises(scout_hf.CacheStateError, match=r"keys \(2, 4, 8\) and values .* \(batch, kv_heads, tokens"):
        cache.update(torch.zeros(2, 4, 8), torch.zeros(2, 4, 8), 0)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("options", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])
def test_the_same_model_while_it_drafts_with_fewer_layers(options):
    """Early exit changes the number in the config itself, for the time of a draft."""
    model, ids = llama(), IDS[:1, :30]
    stock = model.generate(ids, max_new_tokens=12, do_sample=False)
    with scout_hf.patch(model, **options) as handle:
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, assistant_early_exit=2), stock)
        cache = handle.new_cache()
        model.config.num_hidden_layers = 2
        with pytest.raises(scout_hf.CacheStateError, match="of 3 layers.* one of 2"):
            forward(model, ids, cache)
        forward(model, ids, handle.new_cache())
        model.config.num_hidden_layers = 3
        assert torch.isfinite(forward(model, ids, cache)).all()
