"""Masks over queries and keys that a layer gets and that are not causal: obeyed in prompts and later parts of them."""

import functools

import pytest
import torch
from transformers import DynamicCache

import scout_hf
from scout_hf.compat.cache_names import CACHE
from scout_hf.errors import UnsupportedInputError, UnsupportedModelError
from tests.integration.common import EXACT_METHODS, ONE_TIER, TWO_TIERS, llama, prompt

EVERY_TIER = {"one tier": ONE_TIER, "two tiers": TWO_TIERS} | EXACT_METHODS


@functools.cache
def model():
    return llama(num_hidden_layers=2)


def let_see(*blocks: range, hidden: range = range(0), bias: float = 0.0):
    """Hooks under which tokens of a block see each other, and nobody sees what is hidden, as a model would have it."""

    def mask_of(module, args, kwargs):
        queries = args[0].shape[1]
        past = kwargs[CACHE].get_seq_length(module.self_attn.layer_idx)
        order = torch.arange(past + queries)
        allowed = order[past:, None] >= order
        for block in blocks:
            inside = (order >= block.start) & (order < block.stop)
            allowed |= inside[past:, None] & inside
        allowed &= ~((order >= hidden.start) & (order < hidden.stop))
        mask = allowed[None, None]
        if bias or module.self_attn.config._attn_implementation == "eager":
            mask = torch.where(mask, bias, torch.finfo(torch.float32).min)
        return args, kwargs | {"attention_mask": mask}

    return [layer.register_forward_pre_hook(mask_of, with_kwargs=True) for layer in model().model.layers]


@pytest.fixture
def hooks():
    made = []
    yield lambda *blocks, **more: made.extend(let_see(*blocks, **more))
    for hook in made:
        hook.remove()


def in_parts(cache, *parts: int) -> torch.Tensor:
    """Logits of a prompt of so many tokens in each pass, then of two decode steps."""
    ids, found, first = prompt(1, sum(parts) + 2), [], 0
    with torch.no_grad():
        for length in (*parts, 1, 1):
            found.append(model()(ids[:, first : first + length], **{CACHE: cache}).logits)
            first += length
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("tiers", EVERY_TIER)
@pytest.mark.parametrize("parts", [(50,), (30, 20), (16, 9, 25)])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_prompt_and_its_later_parts_obey_the_mask(hooks, implementation, parts, tiers):
    """Both blocks lie within one pass or across two; what comes first cannot see what is not there yet."""
    model().set_attn_implementation(implementation)
    causal = in_parts(DynamicCache(config=model().config), *parts)
    hooks(range(4, 20), range(28, 41))
    expected = in_parts(DynamicCache(config=model().config), *parts)
    assert (expected - causal).abs().max() > 0.01
    with scout_hf.patch(model(), **EVERY_TIER[tiers]) as handle:
        found = in_parts(handle.new_cache(), *parts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tiers", ["one tier", "two tiers", "kvpr", "hgca"])
def test_a_decode_step_that_may_not_see_all_is_refused_and_the_cache_is_as_before(hooks, tiers):
    model().set_attn_implementation("sdpa")
    ids = prompt(1, 52)
    with scout_hf.patch(model(), **EVERY_TIER[tiers]) as handle, torch.no_grad():
        cache = handle.new_cache()
        model()(ids[:, :50], **{CACHE: cache})
        hidden = let_see(hidden=range(3, 5))
        with pytest.raises(UnsupportedInputError, match="hides tokens that are no padding.*DynamicCache"):
            model()(ids[:, 50:51], **{CACHE: cache})
        for hook in hidden:
            hook.remove()
        assert [layer.get_seq_length() for layer in cache.layers] == [50, 50]
        found = [model()(ids[:, at : at + 1], **{CACHE: cache}).logits for at in (50, 51)]
    expected = in_parts(DynamicCache(config=model().config), 50)[:, -2:]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=0)


def test_a_bias_on_the_scores_is_refused_where_it_cannot_be_obeyed(hooks):
    model().set_attn_implementation("sdpa")
    hooks(bias=0.5)
    with scout_hf.patch(model(), **ONE_TIER) as handle, torch.no_grad():
        cache = handle.new_cache()
        model()(prompt(1, 20), **{CACHE: cache})
        for length in (5, 1):
            with pytest.raises(UnsupportedModelError, match="adds a bias to the scores"):
                model()(prompt(1, length), **{CACHE: cache})
            assert cache.get_seq_length() == 20


@pytest.mark.parametrize("tokens", [20, 1])
def test_tokens_that_a_model_puts_in_by_itself_are_refused(tokens):
    """As GIT puts its images in front of the text: masks and lengths of the call are not those of the layers."""
    twice = model().model.embed_tokens.register_forward_hook(lambda *call: call[-1].repeat(1, 2, 1))
    try:
        with scout_hf.patch(model(), **ONE_TIER) as handle, torch.no_grad():
            cache = handle.new_cache()
            with pytest.raises(UnsupportedInputError, match=f"{2 * tokens} tokens in a pass that began with {tokens}"):
                model()(prompt(1, tokens), **{CACHE: cache})
            assert cache.get_seq_length() == 0
    finally:
        twice.remove()


@pytest.mark.parametrize("tiers", EVERY_TIER)
def test_positions_that_begin_again_hide_nothing_once_there_is_a_cache(tiers):
    """Stock looks for packed sequences only in calls without a cache."""
    model().set_attn_implementation("sdpa")
    ids = prompt(1, 41)
    positions = torch.cat([torch.arange(25), torch.arange(16)])[None]

    def logits(cache):
        parts = (slice(0, 40), slice(40, 41))
        calls = [{"input_ids": ids[:, part], "position_ids": positions[:, part], CACHE: cache} for part in parts]
        with torch.no_grad():
            return torch.cat([model()(**call).logits for call in calls], dim=1)

    expected = logits(DynamicCache(config=model().config))
    with scout_hf.patch(model(), **EVERY_TIER[tiers]) as handle:
        torch.testing.assert_close(logits(handle.new_cache()), expected, atol=1e-5, rtol=0)
