"""A cache filled through ``update``, outside a forward pass: what steps need is made then, and is what a pass makes."""

from __future__ import annotations

import pytest
import torch

import scout_hf
from scout_hf.selection.partial import PartialKeys
from scout_hf.selection.table import DigestTable
from tests.integration.common import left_padded, llama, prompt

SPARSE = {"budget": 24, "block_size": 8, "window": 8}
ONE_TIER = {
    **{digest: SPARSE | {"digest": digest} for digest in ("sign", "sign2", "minmax", "minmax-int8", "minmax-sub")},
    "torch": SPARSE | {"digest": "sign", "cpu_backend": "torch"},
    "int8": SPARSE | {"digest": "minmax", "host_dtype": "int8"},
}
INFINIGEN = {
    "infinigen": SPARSE | {"method": "infinigen"},
    "infinigen, kept": SPARSE | {"method": "infinigen", "method_options": {"keep": True}},
}
OTHERS = {
    "two tiers": SPARSE | {"split": "cpu", "resident": 16, "digest": "sign"},
    "hgca": SPARSE | {"method": "hgca", "resident": 16},
    "dense": {"method": "dense", "block_size": 8, "window": 8},
}
INPUTS = {"one row": {"input_ids": prompt(tokens=75)}, "padded": left_padded(0, 21, tokens=75)}
TOKENS, BLOCK, LAYERS = 75, 8, 3


def filled(model, settings, inputs, pieces=(TOKENS,)):
    """A cache with what the stock model keeps of the inputs."""
    with torch.no_grad():
        stock = model(**inputs, use_cache=True).past_key_values
    cache, first = scout_hf.ScoutCache(model.config, **settings), 0
    for tokens in pieces:
        part = slice(first, first + tokens)
        for index, layer in enumerate(stock.layers):
            cache.update(layer.keys[:, :, part], layer.values[:, :, part], index)
        first += tokens
    return cache


def passes(model, cache, inputs, *lengths):
    """Logits of so many tokens more per pass."""
    rows, mask, found = len(inputs["input_ids"]), inputs.get("attention_mask"), []
    for number, tokens in enumerate(lengths):
        ids = prompt(rows, tokens, seed=number)
        more = {}
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, tokens), value=1)
            more["attention_mask"] = mask
        with torch.no_grad():
            found.append(model(ids, past_key_values=cache, use_cache=True, **more).logits[:, -1])
    return torch.stack(found)


@pytest.fixture
def made(monkeypatch):
    """Digests and partial keys made, in blocks and tokens, all layers together."""
    counts = {"blocks": 0, "tokens": 0}
    grow, extend = DigestTable.reserve, PartialKeys.extend

    def counting_grow(self, shape, *args):
        counts["blocks"] += shape[2]
        return grow(self, shape, *args)

    def counting_extend(self, keys):
        counts["tokens"] += keys.shape[2]
        return extend(self, keys)

    monkeypatch.setattr(DigestTable, "reserve", counting_grow)
    monkeypatch.setattr(PartialKeys, "extend", counting_extend)
    return counts


@pytest.mark.parametrize("name", ONE_TIER | INFINIGEN | OTHERS)
@pytest.mark.parametrize("pieces", [(TOKENS,), (1,) * 20 + (30, 25)], ids=["at once", "in pieces"])
def test_the_first_step_makes_no_more_than_others(made, name, pieces):
    model, settings = llama(), (ONE_TIER | INFINIGEN | OTHERS)[name]
    cache = filled(model, settings, INPUTS["one row"], pieces)
    if name != "hgca" and name != "dense":
        assert made["blocks"] >= LAYERS * (TOKENS // BLOCK - 1) or made["tokens"] >= LAYERS * (TOKENS - 2 * BLOCK)
    made.update(blocks=0, tokens=0)
    with scout_hf.patch(model, **settings):
        passes(model, cache, INPUTS["one row"], 1)
    assert made["blocks"] <= LAYERS and made["tokens"] <= LAYERS * BLOCK, made


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("lengths", [(1, 1, 1), (9, 1, 1), (1, 9, 1)], ids=["decode", "a turn first", "a turn later"])
@pytest.mark.parametrize("name", ONE_TIER)
def test_it_is_what_the_pass_would_have_made(name, lengths, inputs):
    """Padding, and the size of queries, become known with the first pass; constants and bounds must not miss them."""
    model, settings, inputs = llama(), ONE_TIER[name], INPUTS[inputs]
    cache = filled(model, settings, inputs)
    late = cache.fork()
    for layer in late.layers:
        layer.method.selector.crop(0)
        layer.method.selector._early = None
    with scout_hf.patch(model, **settings) as handle:
        expected = passes(model, late, inputs, *lengths)
        assert torch.equal(passes(model, cache, inputs, *lengths), expected)
        stats = handle.stats()
        assert 0.2 < stats.attended_tokens / stats.context_tokens < 0.7
    codes = [[layer.method.selector.table.codes() for layer in each.layers] for each in (cache, late)]
    assert all(torch.equal(a, b) for a, b in zip(*codes))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", INFINIGEN)
def test_directions_are_learnt_from_queries_as_soon_as_there_are_any(name, inputs):
    model, settings, inputs = llama(), INFINIGEN[name], INPUTS[inputs]
    cache = filled(model, settings, inputs)
    late = cache.fork()
    for layer in late.layers:
        layer.method.partial, layer.method._guessed_from = PartialKeys(0.2), 0
    with scout_hf.patch(model, **settings):
        turned = cache.fork()
        passes(model, turned, inputs, 9)
        assert all(layer.method.partial.length == layer.method.kv.host.length > 0 for layer in turned.layers)
        expected = passes(model, late, inputs, 9, 1, 1)
        assert torch.equal(passes(model, cache, inputs, 9, 1, 1), expected)
    # Heads this small keep all their directions, so that other ones would not show in what is attended.
    bases = ([layer.method.partial._basis for layer in each.layers] for each in (cache, late))
    assert all(torch.equal(a, b) for a, b in zip(*bases))
