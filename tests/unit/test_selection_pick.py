"""Picking blocks within a budget, row by row and head by head."""

from __future__ import annotations

import math
import random
from dataclasses import MISSING, fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scout_hf import ScoutConfig
from scout_hf.kernels.cpu import make_backend
from scout_hf.selection import Selector, choose, pack_lists
from scout_hf.selection.budget import budgeted
from scout_hf.selection.pick import everything
from scout_hf.step import Step
from tests.libraries import ISAS
from tests.unit.naive import QUICK

BATCH, HEADS, GROUP, DIM, SIZE = 3, 2, 2, 8, 8
KEYS = torch.empty(1, 1, 0, 8)
USED = {"backend": None}


@pytest.fixture(autouse=True, params=["torch", "native"][: 1 + bool(ISAS)])
def scoring_backend(request, monkeypatch):
    """What scores the digests of all steps of a test."""
    monkeypatch.setitem(USED, "backend", make_backend(request.param))


def naive_choose(scores, counts, sinks, padding_mask):
    """For every row and head: sinks first, then by score, at most as many as counted; padding never."""
    found = []
    for row in range(len(scores)):
        real = [b for b in range(scores.shape[2]) if padding_mask is None or padding_mask[row, b]]
        for head in range(scores.shape[1]):
            forced = real[:sinks]
            others = sorted(real[sinks:], key=lambda b: -float(scores[row, head, b]))
            found.append((forced + others)[: counts[row]])
    return found


def chosen(pick):
    ids, valid = pick.ids.flatten(0, 1).tolist(), pick.valid_or_all().flatten(0, 1).tolist()
    return [[block for block, counts in zip(*row) if counts] for row in zip(ids, valid)]


@QUICK
@given(st.integers(0, 10**6), st.integers(1, 12), st.booleans(), st.booleans(), st.integers(0, 3))
def test_choosing_equals_the_naive_way(seed, blocks, per_row, padded, sinks):
    dice, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    scores = torch.randn(BATCH, HEADS, blocks, generator=generator)
    padding_mask = None
    if padded:
        starts = torch.tensor([dice.randint(0, blocks) for _ in range(BATCH)])
        padding_mask = torch.arange(blocks) >= starts[:, None]
    counts = [dice.randint(1, blocks + 2) for _ in range(BATCH if per_row and padded else 1)]
    count = torch.tensor(counts) if per_row and padded else counts[0]
    counts = counts if per_row and padded else counts * BATCH
    pick = choose(scores.clone(), count, sinks, padding_mask)
    expected = naive_choose(scores, counts, sinks, padding_mask)
    for got, wanted in zip(chosen(pick), expected):
        assert len(set(got)) == len(got) and sorted(got) == sorted(wanted)
        # Best first, so that cutting the list off keeps the best; sinks among themselves have no order.
        forced = min(sinks, len(wanted))
        assert set(got[:forced]) == set(wanted[:forced]) and got[forced:] == wanted[forced:]
    for row in pick.ids.flatten(0, 1).tolist():
        assert len(set(row)) == len(row) and all(0 <= block < blocks for block in row)
    assert pick.ids.shape[2] <= blocks and (pick.valid is None) == (padding_mask is None)


def test_a_row_of_nothing_but_padding_chooses_nothing():
    padding_mask = torch.tensor([[False] * 5, [False, False, True, True, True]])
    pick = choose(torch.randn(2, HEADS, 5), 3, 2, padding_mask)
    assert chosen(pick)[:HEADS] == [[]] * HEADS and all(set(row) == {2, 3, 4} for row in chosen(pick)[HEADS:])


def test_heads_choose_for_themselves():
    scores = torch.tensor([[[0.0, 1, 2, 3], [3, 2, 1, 0]]])
    assert chosen(choose(scores, 2, 0, None)) == [[3, 2], [0, 1]]


@pytest.mark.parametrize("padded", [False, True])
def test_everything_is_everything_that_exists(padded):
    padding_mask = torch.tensor([[True] * 4, [False, True, True, True], [False] * 4]) if padded else None
    pick = everything(3, HEADS, 4, padding_mask, "cpu")
    expected = [[0, 1, 2, 3], [1, 2, 3], []] if padded else [[0, 1, 2, 3]] * 3
    assert [sorted(row) for row in chosen(pick)] == [row for row in expected for _ in range(HEADS)]


def step_of(tokens, padding=None):
    mask = None
    if padding:
        mask = torch.arange(tokens) >= torch.tensor(padding)[:, None]
    required = {field.name: None for field in fields(Step) if field.default is field.default_factory is MISSING}
    return Step(**{**required, "queries": 1, "tokens": tokens, "mask": mask, **USED})


def selector_for(tokens, padding=None, **options):
    config = ScoutConfig(**{"digest": "minmax", "block_size": SIZE, "window": 0, "sinks": 0, **options})
    selector, step = Selector(config, 0, KEYS), step_of(tokens, padding)
    generator = torch.Generator().manual_seed(tokens)
    blocks = tokens // SIZE
    keys = torch.randn(BATCH, HEADS, blocks * SIZE, DIM, generator=generator)
    padding_mask = None if step.mask is None else step.token_mask(SIZE, keys.device)[:, :blocks]
    if blocks:
        selector.extend(keys, padding_mask)
    return selector, step, torch.randn(BATCH, HEADS * GROUP, 1, DIM, generator=generator)


def counts_of(tokens, blocks=None, padding=None, **options):
    selector, step, query = selector_for(tokens, padding, **options)
    pick = selector.pick(step, query, tokens // SIZE if blocks is None else blocks, HEADS)
    return [len(row) for row in chosen(pick)][::HEADS]


@pytest.mark.parametrize("budget", [8, 9, 16, 40, 80, 81, 1000])
def test_a_budget_in_tokens_counts_blocks(budget):
    assert counts_of(83, budget=budget) == [min(10, math.ceil(budget / SIZE))] * BATCH


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("tokens", [8, 83, 160])
def test_a_budget_by_share_grows_with_the_context(budget, tokens):
    expected = min(tokens // SIZE, max(1, math.ceil(math.ceil(budget * tokens) / SIZE)))
    assert counts_of(tokens, budget=budget) == [expected] * BATCH


@pytest.mark.parametrize("window", [0, 5, 8, 16, 30])
def test_the_window_is_part_of_the_budget(window):
    recent = math.ceil(window / SIZE)
    assert counts_of(83, 10 - recent, budget=48, window=window) == [6 - recent] * BATCH
    assert counts_of(83, 10 - recent, budget=0.5, window=window) == [6 - recent] * BATCH
    assert counts_of(83, 10 - recent, budget=8, window=window) == [1] * BATCH  # never nothing


def test_a_window_that_is_not_there_any_more_is_not_counted():
    # After a crop the newest tokens are blocks open to selection.
    assert counts_of(83, 10, budget=48, window=32) == [6] * BATCH
    assert counts_of(83, 9, budget=48, window=32) == [5] * BATCH


def test_padding_counts_for_nothing():
    padding = [0, 40, 75]
    assert counts_of(83, padding=padding, budget=0.5) == [6, 3, 1]
    assert counts_of(83, padding=padding, budget=1.0) == [10, 5, 1]
    assert counts_of(83, padding=padding, budget=32) == [4, 4, 1]
    assert counts_of(83, padding=padding, budget=None) == [10, 5, 1]
    assert counts_of(83, padding=padding, budget=32, dense_layers=1) == [10, 5, 1]


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.3, 0.6, 0.7, 0.9])
def test_a_padded_row_gets_what_it_would_get_alone(budget):
    selector = Selector(ScoutConfig(digest="minmax", block_size=SIZE, window=0, budget=budget), 0, KEYS)
    for real in range(1, 700):
        alone = budgeted(selector.config, step_of(real), real // SIZE)
        beside = budgeted(selector.config, step_of(700, [0, 700 - real]), 700 // SIZE)[1]
        assert alone == int(beside), (real, alone, int(beside))


@pytest.mark.parametrize(
    "options", [{"budget": 24}, {"budget": 0.4}, {"budget": 24, "sinks": 9}, {"budget": 40, "window": 16}]
)
@pytest.mark.parametrize("padding", [None, [0, 13, 40]])
def test_picks_are_the_best_by_score(options, padding):
    selector, step, query = selector_for(83, padding, **options)
    open_blocks = 10 - math.ceil(options.get("window", 0) / SIZE)
    scores = selector.digest.score(query, selector.table.codes(open_blocks))
    padding_mask = None if padding is None else step.token_mask(SIZE, torch.device("cpu"))[:, :open_blocks].any(-1)
    pick = selector.pick(step, query, open_blocks, HEADS)
    counts = [len(row) for row in chosen(pick)][::HEADS]
    sinks = math.ceil(options.get("sinks", 0) / SIZE)
    expected = naive_choose(scores, counts, sinks, padding_mask)
    assert [sorted(row) for row in chosen(pick)] == [sorted(row) for row in expected]


def test_the_native_backend_scores_for_itself(monkeypatch):
    selector, step, query = selector_for(83, budget=24)
    monkeypatch.setattr(selector.digest, "score", None)
    if step.backend.name == "native":
        selector.pick(step, query, 10, HEADS)
    else:
        with pytest.raises(TypeError):
            selector.pick(step, query, 10, HEADS)


@QUICK
@given(st.integers(0, 10**6), st.integers(0, 9))
def test_packed_lists_keep_what_is_usable_in_its_order(seed, length):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(BATCH, HEADS, 12, generator=generator).argsort(2)[:, :, :length]
    valid = torch.rand(ids.shape, generator=generator) < torch.rand(BATCH, HEADS, 1, generator=generator)
    lists = pack_lists(ids, valid)
    assert lists.ids.dtype == lists.counts.dtype == torch.int32 and lists.counts.shape == (BATCH, HEADS)
    assert lists.ids.shape[2] == int(valid.sum(2).max() if length else 0)
    for row in range(BATCH):
        for head in range(HEADS):
            packed = lists.ids[row, head, : lists.counts[row, head]].tolist()
            assert packed == ids[row, head][valid[row, head]].tolist()


def test_no_open_block_at_all():
    for options in ({"budget": 16}, {"budget": 0.5}, {"budget": None}):
        for padding in (None, [0, 2, 6]):
            assert counts_of(7, padding=padding, **options) == [0] * BATCH


@pytest.mark.parametrize("options", [{"dense_layers": (0,)}, {"budget": None}, {"budget": 1.0}], ids=str)
def test_a_dense_layer_keeps_no_digests(options):
    selector, step, query = selector_for(83, **options)
    assert selector.dense and selector.blocks == 0 and selector.table.used_bytes == 0
    assert not Selector(ScoutConfig(dense_layers=(0,)), 1, KEYS).dense


def test_structure_goes_through_to_the_digests():
    selector, step, query = selector_for(83, budget=24)
    codes = selector.table.codes().clone()
    twin = selector.fork()
    selector.crop(4)
    twin.select_rows(torch.tensor([2, 0]))
    assert selector.blocks == 4 and torch.equal(selector.table.codes(), codes[:, :, :4])
    assert twin.blocks == 10 and torch.equal(twin.table.codes(), codes[[2, 0]])
