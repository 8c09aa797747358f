"""Prompts go through the stock kernel, without a mask over queries and keys, and KV is kept once."""

import copy

import pytest
import torch

import scout_hf
from scout_hf.kernels.cpu.native_backend import NativeBackend
from tests.libraries import ISAS, using_isa
from tests.patches.tiny import tiny_model

PROMPT = 300


@pytest.fixture
def masks(monkeypatch):
    """Every mask that torch's attention gets to see."""
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def spy(*args, attn_mask=None, **kwargs):
        seen.append(attn_mask)
        return real(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


def inputs(padded):
    ids = torch.randint(1, 60, (3, PROMPT), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :100], mask[2, :7] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("split", ["off", "cpu"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [None, 100])
def test_no_square_mask(masks, split, padded, chunk):
    model = tiny_model("llama")
    with scout_hf.patch(model, split=split, block_size=16):
        model.generate(**inputs(padded), max_new_tokens=2, do_sample=False, prefill_chunk_size=chunk)
    # The first chunk of a prompt is the stock kernel's, layer by layer; padded rows come in groups of equal start.
    assert len(masks) == model.config.num_hidden_layers * (3 if padded and chunk is None else 2 if padded else 1)
    assert all(mask is None for mask in masks)


def test_stock_makes_a_mask_where_we_make_none(masks):
    """Negative control of the spy."""
    tiny_model("llama").generate(**inputs(padded=True), max_new_tokens=2, do_sample=False)
    assert any(mask is not None and mask.dim() == 4 for mask in masks)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_eager_prompts_are_masked_in_slices(monkeypatch, name):
    """Models without sdpa get their masks a few queries at a time."""
    from scout_hf import prefill

    monkeypatch.setattr(prefill, "QUERY_CHUNK", 64)
    model = tiny_model(name)
    with torch.no_grad():
        expected = model(**inputs(padded=False)).logits[:, -1]
        with scout_hf.patch(model, budget=None) as handle:
            found = model(**inputs(padded=False), past_key_values=handle.new_cache()).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=0)


def test_one_tier_keeps_kv_once_and_predicts_nothing():
    model = tiny_model("llama")
    with scout_hf.patch(model, block_size=16) as handle:
        cache = handle.new_cache()
        with torch.no_grad():
            model(input_ids=inputs(False)["input_ids"], past_key_values=cache)
        kv = sum(2 * part.numel() * 4 for part in (layer.method.read_all()[0] for layer in cache.scout_layers))
        held = cache.tier_bytes()
        assert set(held) == {"host", "digests"}
        assert kv <= held["host"] <= 1.1 * kv
        assert not any(layer.method.wants_ahead for layer in cache.scout_layers)


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
@pytest.mark.parametrize("settings", [{"split": "off"}, {"split": "cpu", "layer_ahead": False}], ids=str)
def test_padding_behind_a_prompt(name, settings):
    """The first token comes out of a query that is padding itself; it sees what is before it, as in stock."""
    model, given = tiny_model(name), inputs(padded=False)
    given["attention_mask"][0, -90:], given["attention_mask"][2, -1:] = 0, 0
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**given, **options)
    with scout_hf.patch(model, budget=None, block_size=16, **settings):
        got = model.generate(**given, **options)
    for one, other in zip(got.logits, expected.logits, strict=True):
        assert (one - other).abs().max() <= 3e-6


@pytest.mark.skipif("avx512bf16" not in ISAS, reason="elsewhere torch's own kernel is as fast")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("parts", [(1300,), (600, 700), (3, 1297)], ids=str)
def test_long_prompts_in_bf16_are_attended_over_the_pages(parts, padded, monkeypatch):
    """As near to float64 as stock is; the second part of a prompt, and a next turn, go the same way."""
    served, serve = [], NativeBackend.attend_past

    def watched(*args):
        served.append(serve(*args))
        return served[-1]

    monkeypatch.setattr(NativeBackend, "attend_past", watched)
    model = tiny_model("llama").bfloat16()
    exact = copy.deepcopy(model).double()
    ids = torch.randint(1, 60, (2, sum(parts)), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :700] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), using_isa("avx512bf16"):
        want = exact(ids, attention_mask=mask, position_ids=positions).logits[:, 700:]
        stock = model(ids, attention_mask=mask, position_ids=positions).logits[:, 700:]
        with scout_hf.patch(model, budget=None) as handle:
            cache, found, begin = handle.new_cache(), [], 0
            for part in parts:
                new = slice(begin, begin + part)
                given = {"attention_mask": mask[:, : new.stop], "position_ids": positions[:, new]}
                found.append(model(ids[:, new], past_key_values=cache, **given).logits)
                begin = new.stop
    assert len(served) > len(model.model.layers) and all(part is not None for part in served)
    error, stocks = ((logits.double() - want).abs() for logits in (torch.cat(found, dim=1)[:, 700:], stock))
    assert error.mean() <= 1.2 * stocks.mean() and error.max() <= 2 * stocks.max()
