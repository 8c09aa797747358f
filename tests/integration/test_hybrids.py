"""Models with linear states: what a cache that holds them can do, and what it refuses."""

import pytest
import torch

import scout_hf
from scout_hf import CACHE, CacheStateError, ConfigError, ScoutCache
from scout_hf.cache_layer import ScoutLayer
from scout_hf.compat.linear_layers import Linear, keeps_no_past
from tests.integration.common import ONE_TIER, TWO_TIERS, left_padded, logits, prompt, run
from tests.integration.turns import continued, filled, stock, two_turns
from tests.patches.tiny import own_cache, tiny_model

HYBRIDS = (
    "qwen3_next",
    "qwen3_5",
    "bamba",
    "granite_hybrid",
    "jamba",
    "nemotron_h",
    "lfm2",
    "olmo_hybrid",
    "falcon_h1",
    "zaya",
)
SIDE_BY_SIDE = ("falcon_h1", "zaya")
INPUTS = left_padded(0, 9, tokens=40)
TOLERANCE = 1e-5


def case(name):
    reason = own_cache(name)
    return pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=reason))


EACH = pytest.mark.parametrize("name", [case(name) for name in HYBRIDS])
SOME = pytest.mark.parametrize("name", [case(name) for name in ("qwen3_next", "lfm2", *SIDE_BY_SIDE)])
TIERS = pytest.mark.parametrize("settings", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])


def difference(got, expected):
    truth = logits(expected)
    return (logits(got) - truth).abs().max().item() / max(1.0, truth.abs().max().item())


@pytest.mark.thin(2)
@EACH
@TIERS
def test_a_fork_goes_on_by_itself(name, settings):
    model, ids = tiny_model(name), prompt(2, 40)
    first, second = (torch.cat([ids, prompt(2, 5, seed=seed)], 1) for seed in (5, 6))
    expected = stock(model, ids, first), stock(model, ids, second)
    with scout_hf.patch(model, **settings) as handle:
        cache = filled(model, handle.new_cache(), ids)
        fork = cache.fork()
        assert difference(continued(model, cache, first), expected[0]) <= TOLERANCE
        assert difference(continued(model, fork, second), expected[1]) <= TOLERANCE
        held = [layer for layer in (*cache.layers, *fork.layers) if isinstance(layer, Linear)]
        tensors = [one.data_ptr() for layer in held for one in layer.conv_states.values() if one is not None]
        assert len(tensors) == len(set(tensors)) > 0


@EACH
def test_no_tokens_can_be_taken_back_and_nothing_changes(name):
    """A state holds all tokens before it: cropping is refused before the first layer is cropped."""
    model, (ids, longer) = tiny_model(name), two_turns(1)
    expected = stock(model, ids, longer)
    with scout_hf.patch(model, **TWO_TIERS) as handle:
        cache = handle.new_cache()
        cache.crop(-3)  # nothing to take
        with torch.no_grad():
            model(ids, **{CACHE: cache}, use_cache=True)
        for wanted in (-3, 30):
            with pytest.raises(CacheStateError, match=r"crop\(\): layers? .* linear state.*fork"):
                cache.crop(wanted)
        assert cache.get_seq_length() == 40 and cache.token_ids.tolist() == ids.tolist()
        cache.crop(40)
        assert difference(continued(model, cache, longer), expected) <= TOLERANCE


@SOME
@TIERS
def test_an_interrupted_pass_is_told_and_a_fork_goes_on(name, settings, monkeypatch):
    model, (ids, longer) = tiny_model(name), two_turns(1)
    expected = stock(model, ids, longer)
    with scout_hf.patch(model, **settings) as handle:
        cache = filled(model, handle.new_cache(), ids)
        fork = cache.fork()

        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        hook = model.get_output_embeddings().register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), torch.no_grad():
            model(prompt(1, 1), **{CACHE: cache}, use_cache=True)
        hook.remove()
        with pytest.raises(CacheStateError, match="linear-attention layers, which cannot be rolled back.*fork"):
            continued(model, cache, longer)
        assert difference(continued(model, fork, longer), expected) <= TOLERANCE
        cache.reset()
        assert cache.get_seq_length() == 0
        assert difference(continued(model, cache, longer), expected) <= TOLERANCE


@pytest.mark.thin(2)
@EACH
@TIERS
def test_beams_move_states_too(name, settings):
    model = tiny_model(name)
    options = {"new": 8, "num_beams": 3, "num_return_sequences": 2}
    expected = run(model, INPUTS, **options)
    with scout_hf.patch(model, **settings):
        got = run(model, INPUTS, **options)
    assert torch.equal(got.sequences, expected.sequences) and difference(got, expected) <= TOLERANCE


@EACH
def test_a_cache_that_is_reset_takes_other_rows(name):
    model, (ids, longer) = tiny_model(name), two_turns(3)
    expected = stock(model, ids, longer)
    with scout_hf.patch(model, **TWO_TIERS) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(prompt(2, 30), **{CACHE: cache}, use_cache=True)
        cache.reset()
        model(ids, **{CACHE: cache}, use_cache=True)
        assert difference(continued(model, cache, longer), expected) <= TOLERANCE


@EACH
def test_another_number_of_rows_is_refused_before_a_state_changes(name):
    model, (ids, longer) = tiny_model(name), two_turns(2)
    expected = stock(model, ids, longer)
    with scout_hf.patch(model, **TWO_TIERS) as handle, torch.no_grad():
        cache = handle.new_cache()
        model(ids, **{CACHE: cache}, use_cache=True)
        with pytest.raises(CacheStateError, match="holds 2 rows and got 3 new ones; use batch_repeat_interleave"):
            model(prompt(3, 1), **{CACHE: cache}, use_cache=True)
        assert difference(continued(model, cache, longer), expected) <= TOLERANCE


@pytest.mark.thin(2)
@EACH
def test_rows_of_every_hybrid_are_repeated_and_selected(name):
    """Linear layers of transformers can only be reordered."""
    model, (ids, longer) = tiny_model(name), two_turns(2)
    with scout_hf.patch(model, **TWO_TIERS) as handle:
        cache = handle.new_cache()
        cache.batch_repeat_interleave(3)  # nothing to repeat
        with torch.no_grad():
            model(ids, **{CACHE: cache}, use_cache=True)
        chosen, flagged = cache.fork(), cache.fork()
        cache.batch_repeat_interleave(2)
        chosen.batch_select_indices(torch.tensor([1, 1, 0]))
        flagged.batch_select_indices(torch.tensor([False, True]))
        found = []
        for held, rows in ((cache, [0, 0, 1, 1]), (chosen, [1, 1, 0]), (flagged, [1])):
            assert held.token_ids.tolist() == ids[rows].tolist()
            found.append((continued(model, held, longer[rows]), rows))
    for got, rows in found:
        assert difference(got, stock(model, ids[rows], longer[rows])) <= TOLERANCE


# -- attention and a state in one layer -----------------------------------------------------------------------------

ONE_LAYER = pytest.mark.parametrize("name", [case(name) for name in SIDE_BY_SIDE])


@ONE_LAYER
def test_every_layer_is_kept_and_keeps_its_state(name):
    model = tiny_model(name)
    with scout_hf.patch(model, **TWO_TIERS):
        cache = run(model, INPUTS).past_key_values
    assert all(isinstance(layer, ScoutLayer) and keeps_no_past(layer) for layer in cache.layers)
    assert not cache.is_compileable
    stock = cache.to_dynamic()
    expected = run(model, INPUTS).past_key_values
    for one, other in zip(stock.layers, expected.layers, strict=True):
        assert type(one) is type(other)
        for kept, true in ((one.keys, other.keys), (one.values, other.values)):
            assert (kept - true)[0].abs().max() <= 1e-4 * true.abs().max()
        assert torch.allclose(one.recurrent_states[0], other.recurrent_states[0], rtol=1e-3, atol=1e-4)


@ONE_LAYER
def test_sessions_hold_states(name, tmp_path):
    model, (ids, longer) = tiny_model(name), two_turns(1)
    expected = stock(model, ids, longer)
    with scout_hf.patch(model, **TWO_TIERS) as handle:
        cache = filled(model, handle.new_cache(), ids)
        cache.save(tmp_path / "kv")
        for options in ({}, {"block_size": 16}):
            loaded = ScoutCache.load(tmp_path / "kv", model, **options)
            assert loaded.get_seq_length() == 40
            assert difference(continued(model, loaded, longer), expected) <= TOLERANCE, options


@ONE_LAYER
def test_stores_and_drafts_are_refused(name, tmp_path):
    for options in ({"store": tmp_path / "store"}, {"draft": True, "budget": 64}):
        with pytest.raises(ConfigError, match="a linear state beside its keys and values"):
            scout_hf.patch(tiny_model(name), **options)


@pytest.mark.parametrize("name", [case("jamba")])
def test_a_store_is_refused_where_stock_does_not_go_on_from_a_text(name, tmp_path):
    """Jamba's state-space layers forget it in a pass of several tokens, as in stock's turns: nothing is to find."""
    model, (ids, longer) = tiny_model(name), two_turns(1)
    assert difference(stock(model, ids, longer), run(model, longer, new=4)) > 1e-3
    with pytest.raises(ConfigError, match="store=.* begin anew in every pass of several tokens"):
        scout_hf.patch(model, store=tmp_path)
