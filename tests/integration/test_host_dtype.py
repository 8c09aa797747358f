"""KV kept as int8: near stock in every mode of generate(), said to be approximate, and half the bytes."""

import copy

import pytest
import torch

import scout_hf
from scout_hf import ScoutCache
from tests.integration.common import (
    LOSSY,
    ONE_TIER,
    TWO_TIERS,
    assert_close,
    assert_equal,
    left_padded,
    llama,
    logits,
    prompt,
    run,
)
from tests.libraries import ISAS, without_library
from tests.patches.tiny import tiny_model

# Keys and values are off by up to 1/254 of the largest beside them. Logits here are about 1, and 0.0025 is found.
NEAR = 0.01
INT8 = {"host_dtype": "int8"}
TIERS = pytest.mark.parametrize("settings", [ONE_TIER | INT8, TWO_TIERS | INT8], ids=["one tier", "two tiers"])
WITHOUT = pytest.mark.parametrize("alone", [False, True] if ISAS else [True], ids=["native", "torch alone"][not ISAS :])
REPETITIVE = torch.cat([prompt(1, 12, seed=0)] * 4, dim=1)
MODES = {
    "greedy": (prompt(1, 60), {"new": 30}),
    "padded": (left_padded(0, 5, 21, 49), {"new": 12}),
    "beam": (left_padded(0, 5, 21), {"num_beams": 3, "new": 14}),
    "several answers": (left_padded(0, 5), {"do_sample": True, "num_return_sequences": 3}),
    "prompt lookup": (REPETITIVE, {"prompt_lookup_num_tokens": 4, "new": 20}),
    "prefill in chunks, padded": (left_padded(0, 5, 40, tokens=70), {"prefill_chunk_size": 13}),
}


@pytest.fixture(autouse=True)
def library(request):
    if "alone" in request.fixturenames and request.getfixturevalue("alone"):
        with without_library():
            yield
    else:
        yield


def check(got, expected):
    """The tokens of stock, and logits that are near its own but not the same."""
    assert_close(got, expected, NEAR)
    assert (logits(got) - logits(expected)).abs().max() > 1e-5


@TIERS
@WITHOUT
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.thin(2)
def test_mode(settings, alone, mode):
    model, (inputs, options) = llama(num_hidden_layers=4), MODES[mode]
    torch.manual_seed(0)
    expected = run(model, inputs, **options)
    with scout_hf.patch(model, **settings) as handle:
        torch.manual_seed(0)
        got = run(model, inputs, **options)
        assert isinstance(got.past_key_values, ScoutCache)
        assert not handle.exact and not handle.stats().exact
    check(got, expected)


@TIERS
@WITHOUT
def test_assisted_decoding(settings, alone):
    """Drafts that are not taken are cut off, out of blocks that are packed already too."""
    target, assistant = llama(), llama()
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    expected = run(target, prompt(), new=20, assistant_model=assistant)
    with scout_hf.patch(target, **settings), scout_hf.patch(assistant, **settings):
        check(run(target, prompt(), new=20, assistant_model=assistant), expected)


@TIERS
@WITHOUT
def test_second_turn_and_copies(settings, alone):
    """A prefix with two continuations; neither changes the other, or the prefix."""
    model, prefix = llama(), prompt(2, 45)
    longer = [torch.cat([prefix, prompt(2, tokens, seed=tokens)], dim=1) for tokens in (3, 30)]
    expected = [run(model, ids) for ids in longer]
    with scout_hf.patch(model, **settings) as handle:
        cache = handle.new_cache()
        with torch.no_grad():
            model(prefix, past_key_values=cache)
        twins = [copy.deepcopy(cache), cache.fork()]
        first = [run(model, ids, past_key_values=twin) for ids, twin in zip(longer, twins)]
        for got, stock in zip(first, expected):
            check(got, stock)
        again = [run(model, ids, past_key_values=twin) for ids, twin in zip(longer, [cache.fork(), cache])]
        for got, before in zip(again, first):
            assert_equal(got, before)
        said = first[1].sequences
        ids = torch.cat([said, prompt(2, 7, seed=9)], dim=1)
        got = run(model, ids, past_key_values=twins[1])
    check(got, run(model, ids))


@TIERS
def test_rows_and_crops(settings):
    """Rows that are repeated, chosen and reordered, and a crop into a packed block, between decode steps."""
    model, results = llama(), []
    for patched in (False, True):
        handle = scout_hf.patch(model, **settings) if patched else None
        with torch.no_grad():
            cache = model(prompt(2), use_cache=True, past_key_values=handle.new_cache() if handle else None)
            cache = cache.past_key_values
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 3, 2]))
            cache.reorder_cache(torch.tensor([2, 0, 1]))
            cache.crop(-7)
            steps = [model(prompt(3, 1, seed=step), past_key_values=cache).logits for step in range(12)]
        results.append(torch.stack(steps))
    handle.remove()
    assert 1e-5 < (results[0] - results[1]).abs().max() <= NEAR


def test_native_and_torch_alone_agree():
    """They keep the same bytes and differ in how they round weights."""
    if not ISAS:
        pytest.skip("no native library")
    model, found = llama(), []
    for settings in (ONE_TIER | INT8, TWO_TIERS | INT8):
        with scout_hf.patch(model, **settings):
            found.append(run(model, left_padded(0, 13)))
        with without_library(), scout_hf.patch(model, **settings):
            assert_close(run(model, left_padded(0, 13)), found[-1], NEAR / 2)


@TIERS
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "qwen2_sliding"])
def test_soft_caps_sinks_and_sliding_layers(settings, name):
    model = tiny_model(name)
    expected = run(model, left_padded(0, 13))
    with scout_hf.patch(model, **settings):
        check(run(model, left_padded(0, 13)), expected)


@TIERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_dtypes(settings, dtype):
    model = llama(dtype=dtype)
    steps = []
    for patched in (False, True):
        handle = scout_hf.patch(model, **settings) if patched else None
        with torch.no_grad():
            cache = model(prompt(2), past_key_values=handle.new_cache() if handle else None).past_key_values
            steps.append([model(prompt(2, 1, seed=n), past_key_values=cache).logits.double() for n in range(12)])
    handle.remove()
    assert (torch.stack(steps[0]) - torch.stack(steps[1])).abs().max() <= (0.05 if dtype == torch.bfloat16 else NEAR)


@pytest.mark.parametrize("split", ["off", "cpu"])
def test_sparse_with_recall(split):
    """Selection, residents and recall work on what int8 keeps; answers stay whole numbers near those of full KV."""
    model = llama()
    with scout_hf.patch(model, **LOSSY | {"split": split} | INT8) as handle:
        first = run(model, left_padded(0, 13), new=18)
        assert_equal(run(model, left_padded(0, 13), new=18), first)
        stats = handle.stats()
    assert bool(logits(first).isfinite().all())
    assert stats.attended_tokens < stats.context_tokens
    assert split == "off" or (stats.recalled_blocks and stats.cpu_ratio)


@TIERS
def test_bytes_and_exactness_are_told(settings):
    """A tile of 8 tokens of 8 channels in float32 is 512 bytes, packed 192; the block being filled comes on top."""
    model, plain = llama(), settings | {"host_dtype": None}
    with scout_hf.patch(model, **plain) as handle:
        assert handle.exact
        run(model, prompt())
        full = handle.stats()
        assert full.exact
        run(model, prompt(), past_key_values=handle.new_cache(**INT8))
        assert not handle.stats().exact and handle.exact
        handle.reset_stats()
        run(model, prompt())
        assert handle.stats().exact
    with scout_hf.patch(model, **settings) as handle:
        assert not handle.exact and not handle.stats().exact
        run(model, prompt())
        small = handle.stats()
        assert not small.exact and "approximate" in str(small)
        run(model, prompt(), past_key_values=handle.new_cache(host_dtype=None))
    # 50 tokens, in 3 layers of 2 heads; a window of one block stays on the device.
    tiles, tails = 3 * 2 * (6 - (settings["split"] == "cpu")), 3 * 2 * 512
    assert small.kv_bytes["host"] == tiles * 192 + tails < full.kv_bytes["host"]


def test_heads_that_cannot_be_packed_are_refused():
    """A head size that is odd; the cache stays empty, and other settings work."""
    model = tiny_model("opt", hidden_size=56, num_attention_heads=8)
    expected = run(model, prompt())
    with scout_hf.patch(model, **ONE_TIER, **INT8) as handle:
        cache = handle.new_cache()
        with pytest.raises(scout_hf.UnsupportedModelError, match="even head_dim.*head_dim=7; use host_dtype=None"):
            run(model, prompt(), past_key_values=cache)
        assert cache.get_seq_length() == 0
        assert_close(run(model, prompt(), past_key_values=handle.new_cache(host_dtype=None)), expected)
