"""Models that choose with an indexer what they attend to: their choice is read from pages, and nothing else."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.cache_utils import DynamicCache

import scout_hf
from scout_hf import CACHE, ConfigError, ScoutCache, UnsupportedModelError, attention
from scout_hf.indexed_layer import IndexedLayer
from scout_hf.methods.own_choice import ChosenByModel
from scout_hf.own_choice import choice_of
from scout_hf.pass_hooks import is_patched
from scout_hf.patches import indexed
from tests.integration.common import ONE_TIER, TOLERANCE, TWO_TIERS, left_padded, logits, prompt, run
from tests.integration.turns import continued, filled, stock, two_turns
from tests.patches.tiny import INDEXED, VOCAB, missing, roughen, tiny_config, tiny_model

INPUTS = left_padded(0, 9, tokens=40)
CHOSEN = 15
"""Tokens that a query attends to, at most: 12 and, of Qwen4, those behind its last whole block."""
TIERS = pytest.mark.parametrize("settings", [ONE_TIER, TWO_TIERS], ids=["one tier", "two tiers"])


def case(name, *others):
    reason = missing(name)
    return pytest.param(name, *others, marks=pytest.mark.skipif(bool(reason), reason=reason))


EACH = pytest.mark.parametrize("name", [case(name) for name in INDEXED])
CROPPED = pytest.mark.parametrize("name", [case(name) for name in INDEXED if name != "qwen4_exp"])
"""Qwen4 has linear states too, from which nothing can be taken."""
WHOLE = pytest.mark.parametrize("name", [case(name) for name in INDEXED if name not in ("qwen4_exp", "dots3")])
"""Nor can it from windows of stock."""
SOME = pytest.mark.parametrize("name", [case(name) for name in ("minimax_m3", "deepseek_v32")])
MIXED = pytest.mark.skipif(bool(missing("minimax_m3")), reason=missing("minimax_m3") or "there")


def assert_exact(got, expected, rows=slice(None)):
    assert torch.equal(got.sequences[rows], expected.sequences[rows])
    truth = logits(expected)[:, rows]
    error = (logits(got)[:, rows] - truth).abs().max().item() / max(1.0, truth.abs().max().item())
    assert error <= TOLERANCE, error


def choosing(cache):
    return [layer for layer in cache.layers if isinstance(layer, IndexedLayer)]


@EACH
@TIERS
@pytest.mark.parametrize("padding", [(0, 0), (0, 9), (0, 30)], ids=str)
def test_only_what_the_model_chose_is_attended(name, settings, padding):
    model, inputs = tiny_model(name), left_padded(*padding, tokens=40)
    expected = run(model, inputs, new=6)
    with scout_hf.patch(model, **settings) as handle:
        got = run(model, inputs, new=6)
        stats = handle.stats()
    assert_exact(got, expected)
    layers = [layer.layer_idx for layer in choosing(got[CACHE])]
    seen = [layer for layer in stats.layers if layer.layer in layers]
    assert len(seen) == len(layers) >= 2 and stats.steps == 5
    for layer in seen:
        assert 0 < layer.attended_tokens <= CHOSEN < layer.context_tokens - 10
    if settings is TWO_TIERS:
        assert stats.cpu_ratio > 0.2
    assert_exact(run(model, inputs, new=6), expected)


@EACH
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_implementations_that_stock_has_masks_for(name, implementation):
    """They differ at padding, at which MiniMax M3's indexer looks too."""
    model = tiny_model(name)
    if implementation == "sdpa" and INDEXED[name].eager:
        pytest.skip("its sinks are known to eager attention alone")
    model.set_attn_implementation(implementation)
    calls = [(INPUTS, {}), (left_padded(0, 30, tokens=40), {"prefill_chunk_size": 8})]
    expected = [run(model, inputs, new=6, **options) for inputs, options in calls]
    with scout_hf.patch(model, **ONE_TIER):
        for (inputs, options), truth in zip(calls, expected):
            assert_exact(run(model, inputs, new=6, **options), truth)


@EACH
@TIERS
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_row_of_padding_alone(name, settings, implementation):
    """What it attends to is as arbitrary as in stock: the mean of all values, or nothing."""
    model, ids, mask = tiny_model(name), prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
    if implementation == "sdpa" and INDEXED[name].eager:
        pytest.skip("its sinks are known to eager attention alone")
    model.set_attn_implementation(implementation)
    mask[1] = 0
    expected = run(model, {"input_ids": ids, "attention_mask": mask}, new=6)
    with scout_hf.patch(model, **settings):
        assert_exact(run(model, {"input_ids": ids, "attention_mask": mask}, new=6), expected)


@EACH
def test_another_choice_changes_the_answer(name, monkeypatch):
    """A planted error: if what was chosen did not matter, the tests above would show nothing."""
    model, real = tiny_model(name), ChosenByModel.attend
    expected = run(model, INPUTS, new=6)

    def all_but_one(self, step, query):
        choice = copy.copy(step.choice)
        if hasattr(choice, "mask"):
            choice.mask = choice.mask.clone()
            choice.mask[..., choice.mask.int().argmax(-1)] = False
        else:
            choice.indices = choice.indices[..., 1:]
        step.choice = choice
        return real(self, step, query)

    monkeypatch.setattr(ChosenByModel, "attend", all_but_one)
    with scout_hf.patch(model, **ONE_TIER):
        got = run(model, INPUTS, new=6)
    assert (logits(got) - logits(expected)).abs().max() > 1e-3


@TIERS
@pytest.mark.parametrize("name", [case("minimax_m3")])
def test_a_model_that_sees(name, settings):
    vision = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
    ids = prompt(1, 40) % (VOCAB - 8)
    ids[0, 5:9] = image = VOCAB - 8
    places = {"image_token_index": image, "video_token_index": image + 1, "projector_hidden_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {"text_config": tiny_config(name).to_dict(), "vision_config": vision}
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("minimax_m3_vl", **parts, **places))
        roughen(model)
        seen = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **seen}
    expected = run(model.eval(), inputs, new=6)
    with scout_hf.patch(model, **settings) as handle:
        assert_exact(run(model, inputs, new=6), expected)
        assert handle.stats().layers[0].attended_tokens <= CHOSEN


@EACH
@TIERS
def test_chunks_of_a_prompt(name, settings):
    model = tiny_model(name)
    expected = run(model, INPUTS, new=6, prefill_chunk_size=8)
    with scout_hf.patch(model, **settings):
        assert_exact(run(model, INPUTS, new=6, prefill_chunk_size=8), expected)


@EACH
@TIERS
def test_next_turns_and_forks(name, settings):
    model, (ids, longer) = tiny_model(name), two_turns(2)
    other = torch.cat([ids, prompt(2, 5, seed=6)], 1)
    with scout_hf.patch(model, **settings) as handle:
        cache = filled(model, handle.new_cache(), ids)
        fork = cache.fork()
        got = continued(model, cache, longer), continued(model, fork, other)
    assert_exact(got[0], stock(model, ids, longer))
    assert_exact(got[1], stock(model, ids, other))


@EACH
@TIERS
def test_beams(name, settings):
    model, options = tiny_model(name), {"new": 6, "num_beams": 3, "num_return_sequences": 2}
    expected = run(model, INPUTS, **options)
    with scout_hf.patch(model, **settings):
        assert_exact(run(model, INPUTS, **options), expected)


@CROPPED
def test_rows_are_repeated_and_selected(name):
    model, (ids, longer) = tiny_model(name), two_turns(2)
    with scout_hf.patch(model, **ONE_TIER) as handle:
        cache = filled(model, handle.new_cache(), ids)
        twice = cache.fork()
        cache.batch_select_indices(torch.tensor([1, 1, 0]))
        twice.batch_repeat_interleave(2)
        rows = torch.tensor([1, 1, 0]), torch.tensor([0, 0, 1, 1])
        got = [continued(model, held, longer[those]) for held, those in zip((cache, twice), rows)]
    for output, those in zip(got, rows):
        assert_exact(output, stock(model, ids[those], longer[those]))


@WHOLE
@TIERS
def test_tokens_are_taken_back(name, settings):
    model, (ids, longer) = tiny_model(name), two_turns()
    rejected = torch.cat([ids, prompt(1, 9, seed=8)], 1)
    # Scores of indexers tie, and how is a matter of the length of a pass: stock takes back as well.
    own = filled(model, DynamicCache(config=model.config), rejected)
    own.crop(-9)
    expected = continued(model, own, longer)
    with scout_hf.patch(model, **settings) as handle:
        cache = filled(model, handle.new_cache(), rejected)
        cache.crop(-9)
        held = {layer.index_keys.shape[-2] for layer in choosing(cache) if layer.index_keys is not None}
        assert held == {40} == {layer.get_seq_length() for layer in choosing(cache)}
        assert_exact(continued(model, cache, longer), expected)
    looked_up = run(model, longer, new=8, prompt_lookup_num_tokens=3)
    with scout_hf.patch(model, **settings):
        got = run(model, longer, new=8, prompt_lookup_num_tokens=3)
    assert torch.equal(got.sequences, looked_up.sequences)


@CROPPED
@TIERS
def test_an_interrupted_pass_is_rolled_back(name, settings):
    model, (ids, longer) = tiny_model(name), two_turns()
    expected = stock(model, ids, longer)
    with scout_hf.patch(model, **settings) as handle:
        cache = filled(model, handle.new_cache(), ids)

        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        last = handle._family.layers(handle._decoder)[-1]
        for part in (last, last.self_attn.o_proj):
            hook = part.register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt), torch.no_grad():
                model(prompt(1, 3), **{CACHE: cache}, use_cache=True)
            hook.remove()
            assert cache.get_seq_length() == 40
            held = [layer.index_keys for layer in choosing(cache) if layer.index_keys is not None]
            assert {keys.shape[-2] for keys in held} == {40}
        assert_exact(continued(model, cache, longer), expected)


@EACH
def test_sessions_hold_the_keys_of_the_indexer(name, tmp_path):
    model, (ids, longer) = tiny_model(name), two_turns()
    expected = stock(model, ids, longer)
    with scout_hf.patch(model, **ONE_TIER) as handle:
        filled(model, handle.new_cache(), ids).save(tmp_path / "kv")
        for options in ({}, {"block_size": 16}, {"split": "cpu"}):
            loaded = ScoutCache.load(tmp_path / "kv", model, **options)
            assert loaded.get_seq_length() == 40
            assert_exact(continued(model, loaded, longer), expected)


@EACH
def test_stock_goes_on_with_a_copy_and_fills_a_cache(name):
    model, (ids, longer) = tiny_model(name), two_turns()
    expected = stock(model, ids, longer)
    with scout_hf.patch(model, **ONE_TIER) as handle:
        copied = filled(model, handle.new_cache(), ids).to_dynamic()
        with pytest.warns(UserWarning, match="runs stock attention"):
            own = filled(model, DynamicCache(config=model.config), ids)
        assert [type(layer) for layer in copied.layers] == [type(layer) for layer in own.layers]
        # A pass without a ScoutCache is stock's, masks and all.
        assert_exact(continued(model, own, longer), expected)
    assert_exact(continued(model, copied, longer), expected)
    cache = filled(model, ScoutCache(model.config, **ONE_TIER), ids)
    with scout_hf.patch(model, **ONE_TIER):
        assert_exact(continued(model, cache, longer), expected)


@SOME
def test_settings_around_it(name, tmp_path):
    model = tiny_model(name)
    expected = run(model, INPUTS, new=6)
    spilled = {"host_memory": "1MiB", "spill_dir": str(tmp_path)}
    for settings in ({}, spilled, {"monitor": 1.0}, {"cpu_backend": "torch"}):
        with scout_hf.patch(model, **settings):
            assert_exact(run(model, INPUTS, new=6), expected)
    with scout_hf.patch(model, **ONE_TIER, host_dtype="int8") as handle:
        assert not handle.exact
        got = run(model, INPUTS, new=6)
    assert 0 < (logits(got)[1] - logits(expected)[1]).abs().max() <= 0.2 * logits(expected).abs().max()


@MIXED
def test_a_budget_is_for_layers_that_do_not_choose():
    """MiniMax M3 has such layers; where all choose, a number is refused, and steps are exact by themselves."""
    mixed, model = tiny_model("minimax_m3"), tiny_model("deepseek_v32")
    with scout_hf.patch(mixed, budget=16, block_size=8, sinks=0, window=8) as handle:
        run(mixed, prompt(1, 80), new=4)
        layers = {layer.layer: layer.attended_tokens for layer in handle.stats().layers}
    assert layers[0] <= CHOSEN and 16 <= layers[1] <= 24 and not handle.exact
    for given in ({"budget": 64}, {"budget": 0.5}, {"mass": 0.9}):
        with pytest.raises(ConfigError, match="choose with an indexer of their own.*leave it out"):
            scout_hf.patch(model, **given)
    with scout_hf.patch(model) as handle:
        run(model, prompt(1, 40), new=4)
        assert handle.exact and handle.stats().exact


@SOME
def test_what_does_not_fit_is_refused(name, tmp_path):
    model = tiny_model(name)
    for options, message in (
        ({"store": tmp_path / "store"}, "indexer: its keys lie in no page"),
        ({"draft": True, "budget": "auto"}, "indexer: its keys lie in no page"),
        ({"method": "dense"}, "which only 'scout' follows"),
        ({"dense_layers": (0,)}, "were trained with that"),
    ):
        with pytest.raises(ConfigError, match=message):
            scout_hf.patch(model, **options)


@SOME
def test_a_layer_that_does_not_say_what_it_chose_is_refused(name, monkeypatch):
    model, (ids, longer) = tiny_model(name), two_turns()
    expected = stock(model, ids, longer)
    with scout_hf.patch(model, **ONE_TIER) as handle:
        cache = filled(model, handle.new_cache(), ids)
        with monkeypatch.context() as changed, torch.no_grad():
            changed.setattr(attention, "choice_of", lambda *args: choice_of(*args[:-1], {}))
            with pytest.raises(UnsupportedModelError, match="attends with no choice, though"):
                model(prompt(1, 1), **{CACHE: cache}, use_cache=True)
        assert_exact(continued(model, cache, longer), expected)


@MIXED
def test_groups_of_heads_that_do_not_fit_are_refused():
    model = tiny_model("minimax_m3", index_n_heads=4)
    with pytest.raises(UnsupportedModelError, match="num_key_value_heads=2 and index_n_heads=4"):
        scout_hf.patch(model, **ONE_TIER)
    assert not is_patched(model.model)
    # Without a layer that chooses it does not matter.
    scout_hf.patch(tiny_model("minimax_m3", index_n_heads=4, layer_types=["full_attention"] * 4), **ONE_TIER).remove()


@MIXED
def test_one_choice_for_several_kv_heads():
    model = tiny_model("minimax_m3", index_n_heads=1)
    expected = run(model, INPUTS, new=6, prefill_chunk_size=8)
    with scout_hf.patch(model, **ONE_TIER):
        assert_exact(run(model, INPUTS, new=6, prefill_chunk_size=8), expected)


@pytest.mark.parametrize(
    "name, what, message",
    [
        case("glm_moe_dsa", "choosing_layers", "indexer in its own modules"),
        case("qwen4_exp", "keep_positions", "positions of all tokens on the cache"),
    ],
)
def test_releases_that_keep_it_elsewhere_are_refused(name, what, message, monkeypatch):
    monkeypatch.setattr(indexed, what, lambda config: ())
    with pytest.raises(UnsupportedModelError, match=message):
        scout_hf.patch(tiny_model(name))
