"""Recall on two tiers: when it happens, what it brings, and profiles that set its rhythm."""

import pytest
import torch

import scout_hf
from tests.patches.tiny import tiny_model

PROMPT = 200


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def decode(model, steps=24, **settings):
    ids = torch.randint(1, 60, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    options = dict(budget=48, block_size=8, window=8, split="cpu") | settings
    with scout_hf.patch(model, **options) as handle:
        model.generate(ids, max_new_tokens=steps + 1, min_new_tokens=steps + 1, do_sample=False)
        return handle.stats()


def test_without_recall_nothing_comes_back(executor, model):
    assert decode(model, recall=None).recalled_blocks == 0


def test_a_threshold_bounds_the_share_of_the_cpu(executor, model):
    adaptive, never = decode(model, recall=0.12), decode(model, recall=None)
    assert adaptive.recalled_blocks > 0
    assert adaptive.cpu_ratio < never.cpu_ratio


def test_a_short_interval_recalls_more_than_a_long_one(model):
    often, seldom = decode(model, recall=1), decode(model, recall=8)
    assert often.recalled_blocks > seldom.recalled_blocks > 0
    assert often.cpu_ratio <= seldom.cpu_ratio


def test_recall_counts_bytes_of_whole_blocks(model):
    stats = decode(model, recall=1)
    head_dim = model.config.hidden_size // model.config.num_attention_heads
    assert stats.recalled_bytes == stats.recalled_blocks * 2 * 8 * head_dim * 4


def test_a_profile_sets_the_interval_of_each_layer(executor, model, tmp_path):
    with scout_hf.patch(model, budget=48, block_size=8, window=8, split="cpu") as handle:
        prompts = [torch.randint(1, 60, (1, PROMPT), generator=torch.Generator().manual_seed(s)) for s in range(2)]
        profile = handle.profile_recall(prompts, steps=12)
        assert handle.stats().steps > 0
    assert len(profile.intervals) == model.config.num_hidden_layers
    profile.save(tmp_path / "recall.json")
    loaded = scout_hf.RecallIntervals.load(tmp_path / "recall.json")
    assert loaded == profile
    assert decode(model, recall=loaded).steps == 24


def test_an_interval_of_zero_never_recalls_that_layer(executor, model):
    depth = model.config.num_hidden_layers
    profile = scout_hf.RecallIntervals((0,) + (1,) * (depth - 1), 0.12, model.config.model_type)
    layers = decode(model, recall=profile).layers
    assert layers[0].recalled_blocks == 0
    assert all(layer.recalled_blocks > 0 for layer in layers[1:])


def test_profiling_needs_two_tiers_and_token_ids(model):
    with scout_hf.patch(model, budget=48, block_size=8) as handle:
        with pytest.raises(scout_hf.ConfigError, match="one tier"):
            handle.profile_recall([torch.ones(1, 20, dtype=torch.long)])
    with scout_hf.patch(model, budget=48, block_size=8, split="cpu") as handle:
        for wrong in ("a text", [], ["a text"], [object()]):
            with pytest.raises(scout_hf.ConfigError, match="token id"):
                handle.profile_recall(wrong)
        for wrong in ([torch.ones(2, 20, dtype=torch.long)], [torch.ones(20)], [[]], [5, 7], [[True, False]]):
            with pytest.raises(scout_hf.ConfigError, match="each by itself"):
                handle.profile_recall(wrong)


def test_recall_does_not_change_what_is_attended_when_everything_is(executor, model):
    """Budget None with the real query: residents and CPU together always cover the whole context."""
    ids = torch.randint(1, 60, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    stock = model.generate(ids, max_new_tokens=12, output_logits=True, return_dict_in_generate=True, do_sample=False)
    settings = dict(budget=None, block_size=8, window=8, resident=40, split="cpu", layer_ahead=False)
    for recall in (None, 1, 0.5):
        with scout_hf.patch(model, recall=recall, **settings):
            out = model.generate(
                ids, max_new_tokens=12, output_logits=True, return_dict_in_generate=True, do_sample=False
            )
        for ours, theirs in zip(out.logits, stock.logits):
            torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=0)
