"""Passes of a patched model that run stock attention: counted, and each reason is warned about once, if not chosen."""

import warnings

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig

import scout_hf
from scout_hf.compat.cache_names import CACHE
from tests.integration.common import ONE_TIER, llama, prompt, run


@pytest.fixture
def model():
    return llama(num_hidden_layers=2)


def dynamic(model):
    return {CACHE: DynamicCache(config=model.config)}


# What is asked of generate(), and what the statistics say of its passes.
CALLS = {
    "cache given": (dynamic, "a DynamicCache was given"),
    "static": (lambda model: {"cache_implementation": "static"}, "cache_implementation='static'"),
    "weights wanted": (lambda model: {"output_attentions": True}, "output_attentions=True"),
}


@pytest.mark.parametrize("call", CALLS)
def test_generate_that_falls_back_is_counted_and_warned_of_once(model, call):
    make, reason = CALLS[call]
    model.set_attn_implementation("eager")
    with scout_hf.patch(model, **ONE_TIER) as handle:
        with pytest.warns(UserWarning, match="stock attention") as warned:
            run(model, prompt(), new=5, **make(model))
        assert reason in str(warned[0].message) and "stats()" in str(warned[0].message)
        assert handle.stats().stock_passes == {reason: 5}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(model, prompt(), new=5, **make(model))
        assert handle.stats().stock_passes == {reason: 10}
        assert handle.stats().steps == 0
        assert "10 passes" in str(handle.stats()) and reason.split("=")[0] in str(handle.stats())
        handle.reset_stats()
        assert handle.stats().stock_passes == {}


def test_passes_that_are_served_are_none_of_them(model):
    with scout_hf.patch(model, **ONE_TIER) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, prompt())
        run(model, prompt(), cache_implementation="dynamic")
        assert handle.stats().stock_passes == {}
        assert "stock" not in str(handle.stats())


def test_one_warning_for_each_handle(model):
    for _ in range(2):
        with scout_hf.patch(model, **ONE_TIER):
            with pytest.warns(UserWarning, match="stock attention"):
                run(model, prompt(), cache_implementation="static")


def test_every_reason_has_its_own_warning(model):
    model.set_attn_implementation("eager")
    with scout_hf.patch(model, **ONE_TIER) as handle:
        for make, reason in CALLS.values():
            with pytest.warns(UserWarning, match="stock attention") as warned:
                run(model, prompt(), new=3, **make(model))
            assert len(warned) == 1 and reason in str(warned[0].message)
        assert handle.stats().stock_passes == {reason: 3 for _, reason in CALLS.values()}


@pytest.mark.parametrize("given", ["keyword", "config"])
def test_generate_without_a_cache_is_counted_without_a_warning(model, given):
    """Who asks for no cache gets none; other reasons are still warned about afterwards."""
    options = {"use_cache": False}
    if given == "config":
        options = {"generation_config": GenerationConfig(use_cache=False, do_sample=False, max_length=None)}
    with scout_hf.patch(model, **ONE_TIER) as handle:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(model, prompt(), new=5, **options)
        assert handle.stats().stock_passes == {"use_cache=False": 5}
        with pytest.warns(UserWarning, match="a DynamicCache was given"):
            run(model, prompt(), new=5, **dynamic(model))


def test_a_model_whose_own_settings_want_no_cache_is_told_of(model):
    """As after training with gradient checkpointing: nobody who calls generate() sees it."""
    model.generation_config.use_cache = False
    with scout_hf.patch(model, **ONE_TIER) as handle:
        with pytest.warns(UserWarning, match="use_cache=False in the model's generation_config"):
            run(model, prompt(), new=5)
        assert handle.stats().stock_passes == {"use_cache=False": 5}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(model, prompt(), new=5)
            assert isinstance(run(model, prompt(), new=5, use_cache=True)[CACHE], scout_hf.ScoutCache)


def test_forward_without_a_cache_is_counted_without_a_warning(model):
    """Scoring and training are meant to run stock attention."""
    with scout_hf.patch(model, **ONE_TIER) as handle, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(prompt(2, 20))
        model(prompt(2, 20), use_cache=False)
        model.model(prompt(2, 20))
        assert handle.stats().stock_passes == {"no cache was given": 2, "use_cache=False": 1}


def test_forward_with_another_cache(model):
    with scout_hf.patch(model, **ONE_TIER) as handle, torch.no_grad():
        with pytest.warns(UserWarning, match="a DynamicCache was given"):
            model(prompt(2, 20), **{CACHE: DynamicCache(config=model.config)})
        assert handle.stats().stock_passes == {"a DynamicCache was given": 1}


BATCH = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
# As it comes, it takes most of the machine's memory.
FEW_BLOCKS = {"num_blocks": 8, "max_batch_tokens": 64}


def batch(model, inputs):
    """Tokens of ``generate_batch``, and the names of the implementation before and after."""
    before = model.config._attn_implementation
    few = ContinuousBatchingConfig(**FEW_BLOCKS)
    results = model.generate_batch(
        inputs=inputs, generation_config=BATCH, continuous_batching_config=few, progress_bar=False
    )
    return [result.generated_tokens for result in results.values()], before, model.config._attn_implementation


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_continuous_batching_is_stock_and_leaves_the_patch_as_it_was(implementation):
    """It asks for the implementation's name, sets another one for a while, and gives the first back."""
    inputs = [prompt(tokens=30)[0].tolist(), prompt(tokens=12, seed=2)[0].tolist()]
    stock, model = llama(num_hidden_layers=2), llama(num_hidden_layers=2)
    for each in (stock, model):
        each.set_attn_implementation(implementation)
    alone = run(stock, prompt())
    expected = batch(stock, inputs)
    if len(expected[0]) < len(inputs):
        pytest.skip("the continuous batching of this transformers fails by itself; 5.4 does beside opentelemetry")
    with scout_hf.patch(model, **ONE_TIER) as handle:
        run(model, prompt())
        with pytest.warns(UserWarning, match="stock attention.*continuous batching"):
            assert batch(model, inputs) == expected
        (reason,) = handle.stats().stock_passes
        assert "continuous batching" in reason
        output = run(model, prompt())
        assert isinstance(output[CACHE], scout_hf.ScoutCache)
        assert torch.equal(output.sequences, alone.sequences)
        assert batch(model, inputs)[0] == expected[0]
    assert type(model.config._attn_implementation) is str
    assert model.config._attn_implementation == stock.config._attn_implementation
