"""Digests: the bound they promise, padding, the table that keeps them, and their registry."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scout_hf import ConfigError, selection
from scout_hf.selection import Digest, DigestTable, MinMax, digest_names, make_digest, register_digest
from tests.unit.naive import QUICK
from tests.unit.selecting import draw, naive_score


@QUICK
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3, 8]), st.integers(1, 9), st.sampled_from([1.0, 20.0]))
def test_the_score_bounds_every_product_and_equals_the_formula(seed, group, size, loud):
    query, keys = draw(seed, 2, 2, group, 5, size, 8, loud=loud)
    padding_mask = torch.rand(2, 5, size, generator=torch.Generator().manual_seed(seed)) > 0.3
    for given_exists in (None, padding_mask):
        score = MinMax().score(query, MinMax().encode(keys, given_exists))
        expected = naive_score(query, keys, given_exists)
        slack = 1e-5 * loud**2 * group
        assert score.dtype == torch.float32 and (score - expected).abs().max() <= slack
        products = torch.einsum("bhgd,bhnsd->bhgns", query.double().view(2, 2, group, 8), keys.double())
        if given_exists is not None:
            products = products.masked_fill(~padding_mask[:, None, None], -torch.inf)
        # The group's sum at any one token, and the sum of each head's own best token.
        assert bool((score + slack >= products.sum(2).amax(-1)).all())
        best = products.amax(-1).sum(2)
        assert bool((score + slack >= best).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_codes_have_the_dtype_of_the_keys_and_the_size_of_one_token(dtype):
    query, keys = draw(0, 2, 2, 4, 6, 8, 16, dtype)
    codes = MinMax().encode(keys, None)
    assert codes.dtype == dtype and codes.shape == (2, 2, 6, 32)
    score, expected = MinMax().score(query, codes), naive_score(query, keys)
    assert score.dtype == torch.float32
    assert (score - expected).abs().max() <= 8 * max(
        torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    ) * expected.abs().max()


def test_scores_of_large_keys_in_half_precision_stay_finite_and_ordered():
    # Some models have key channels in the hundreds: the bound over a group then exceeds what float16 can hold.
    query, keys = draw(0, 1, 1, 8, 6, 8, 128, torch.float16, loud=30.0)
    score = MinMax().score(query, MinMax().encode(keys, None))
    expected = naive_score(query, keys)
    assert expected.max() > torch.finfo(torch.float16).max
    assert bool(torch.isfinite(score).all())
    assert (score - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_padding_has_no_say_in_a_digest():
    query, keys = draw(0, 2, 2, 2, 4, 8, 8)
    padding_mask = torch.ones(2, 4, 8, dtype=torch.bool)
    padding_mask[0, 0], padding_mask[0, 1, :5], padding_mask[1, 2, 6:] = False, False, False
    clean = MinMax().encode(keys, padding_mask)
    for rubbish in (1e6, -1e6, torch.inf, -torch.inf):
        dirty = keys.masked_fill(~padding_mask[:, None, :, :, None], rubbish)
        assert torch.equal(MinMax().encode(dirty, padding_mask), clean)
    assert bool(torch.isfinite(clean).all())
    assert torch.equal(MinMax().encode(keys, torch.ones_like(padding_mask)), MinMax().encode(keys, None))


@QUICK
@given(st.integers(0, 10**6))
def test_the_table_is_a_cat_that_can_be_cut_and_forked(seed):
    dice = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    worlds = [(DigestTable(), torch.empty(2, 2, 0, 6))]
    for _ in range(25):
        index = dice.randrange(len(worlds))
        table, plain = worlds[index]
        deed = dice.choice(["append", "append", "append", "crop", "rows", "fork"])
        if deed == "append":
            new = torch.randn(len(plain), 2, dice.choice([1, 1, 2, 7, 40]), 6, generator=generator)
            table.append(new)
            plain = torch.cat([plain, new], 2)
        elif deed == "crop":
            left = dice.randint(0, plain.shape[2] + 2)
            table.crop(left)
            plain = plain[:, :, :left]
        elif deed == "rows" and plain.shape[2]:
            rows = torch.tensor([dice.randrange(len(plain)) for _ in range(dice.randint(1, 3))])
            table.select_rows(rows)
            plain = plain[rows]
        elif deed == "fork" and len(worlds) < 3:
            worlds.append((table.fork(), plain))
        worlds[index] = (table, plain)
        for one, expected in worlds:
            assert one.blocks == expected.shape[2]
            if one.blocks:
                part = dice.randint(1, one.blocks)
                assert torch.equal(one.codes(), expected) and torch.equal(one.codes(part), expected[:, :, :part])
                assert one.used_bytes >= expected.numel() * 4


def test_an_empty_table_weighs_nothing_and_can_be_handled():
    table = DigestTable()
    table.crop(0)
    table.select_rows(torch.tensor([0, 0]))
    assert table.used_bytes == 0 and table.blocks == 0 and table.fork().blocks == 0


def test_appending_one_block_at_a_time_copies_seldom():
    table, places = DigestTable(), set()
    for _ in range(500):
        table.append(torch.zeros(1, 1, 1, 4))
        places.add((table.codes().data_ptr(), table.used_bytes))
    assert len(places) <= 20


@pytest.fixture
def no_traces(monkeypatch):
    monkeypatch.setattr(selection.digest, "_DIGESTS", copy.deepcopy(selection.digest._DIGESTS))


class Mean(Digest):
    name = "mean"

    def encode(self, keys, padding_mask):
        return keys.mean(3)

    def score(self, query, codes):
        return (query.view(*codes.shape[:2], -1, codes.shape[-1]).sum(2, keepdim=True) @ codes.mT).squeeze(2).float()


def test_a_digest_of_ones_own_can_be_registered(no_traces):
    before = digest_names()
    assert "minmax" in before and "mean" not in before
    assert register_digest(Mean) is Mean and register_digest(Mean) is Mean
    assert digest_names() == ("auto", *sorted((*before[1:], "mean"))) and isinstance(make_digest("mean"), Mean)


def test_what_cannot_be_registered(no_traces):
    nameless = type("Nameless", (Mean,), {"name": ""})
    for wrong in (nameless, Mean(), "mean", object, None, Digest):
        with pytest.raises(ConfigError, match="register a subclass of Digest that sets a name"):
            register_digest(wrong)
    register_digest(Mean)
    with pytest.raises(ConfigError, match="'mean' is registered already; choose another name"):
        register_digest(type("Other", (Mean,), {}))
    with pytest.raises(ConfigError, match="digest='median' is not known; available are 'auto', 'mean', 'minmax'.*"):
        make_digest("median")
