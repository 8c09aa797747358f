"""Choosing blocks without sorting, and moving them into slots, against the torch code and a plain account of both."""

from __future__ import annotations

import sys

import pytest
import torch

pytest.importorskip("triton")

from scout_hf.kernels.triton.append import append_token  # noqa: E402
from scout_hf.kernels.triton.choose import Choice, choose  # noqa: E402
from scout_hf.kernels.triton.recall import Moves, adopt_block, copy_blocks, plan_recall, run_of_blocks  # noqa: E402
from scout_hf.selection import pick  # noqa: E402
from scout_hf.stores import PagedKV  # noqa: E402
from tests.triton.grid import DEVICE, ON_GPU, chance, draw, lists_of_blocks, slots_of, whole  # noqa: E402

BATCH, HEADS = 2, 3


def lists(wanted):
    return [[one.nonzero().flatten().tolist() for one in row] for row in wanted]


def check_choice(choice, scores, count, sinks, padding_mask, slots):
    """The same scores as torch's topk finds, and the same blocks where no two scores are equal."""
    best = pick.choose(scores.clone(), count, sinks, padding_mask)
    valid = best.valid_or_all()
    for row, chosen in enumerate(lists(choice.is_chosen)):
        for head, blocks in enumerate(chosen):
            expected = best.ids[row, head][valid[row, head]].tolist()
            assert len(blocks) == len(expected) == int(choice.chosen_counts[row, head])
            of = scores[row, head]
            if len(of.unique()) == len(of):
                assert blocks == sorted(expected)
            else:
                rest = [sorted(of[each].tolist())[: max(0, len(each) - sinks)] for each in (blocks, expected)]
                assert rest[0] == rest[1]
            absent = [block for block in blocks if slots[row, head, block] < 0]
            assert choice.missing[row, head, : int(choice.missing_counts[row, head])].tolist() == absent


@pytest.mark.parametrize("seed", range(6))
def test_the_best_blocks_are_chosen(seed, monkeypatch):
    monkeypatch.setattr(sys.modules[choose.__module__], "CHUNK_BLOCKS", 16 if seed % 2 else 4096)
    blocks, sinks = int(whole(seed, 1, 50, 1)), seed % 4
    scores = draw(seed, BATCH, HEADS, blocks)
    if seed % 3 == 0:
        scores = (scores * 2).round()  # many of equal score
    padding_mask = ~chance(seed + 1, 0.3, BATCH, blocks) if seed % 4 == 1 else None
    count = whole(seed + 2, 1, blocks + 2, BATCH) if seed % 5 == 2 else int(whole(seed + 2, 1, blocks + 3, 1))
    slots = torch.where(chance(seed + 3, 0.5, BATCH, HEADS, blocks), 0, -1).int()
    most = int(count.max()) if isinstance(count, torch.Tensor) else count
    choice = choose(scores, count, sinks, padding_mask, slots, most)
    check_choice(choice, scores, count, sinks, padding_mask, slots)


def test_blocks_of_equal_score_are_taken_from_the_front():
    choice = choose(torch.zeros(1, 1, 40), 5, 0, None, torch.full((1, 1, 40), -1, dtype=torch.int32), 5)
    assert lists(choice.is_chosen) == [[[0, 1, 2, 3, 4]]]


def test_extreme_scores_keep_their_order():
    scores = torch.tensor([[[-1e38, 0.0, -0.0, 1e-40, 3e38, -torch.inf, -1e-40, -2.0]]])
    slots = torch.full((1, 1, 8), -1, dtype=torch.int32)
    found = [lists(choose(scores, count, 0, None, slots, 8).is_chosen)[0][0] for count in range(1, 9)]
    assert [set(found[0])] + [set(b) - set(a) for a, b in zip(found, found[1:])] == [
        {4}, {3}, {1}, {2}, {6}, {7}, {0}, set(),
    ]  # fmt: skip


@pytest.mark.parametrize("mask", [0xFF, 0xFF00, 0xFF0000, 0x7F000000, 0xFF800000, 0x01010101, 0x3], ids=hex)
def test_scores_that_differ_in_few_bits_are_told_apart(mask):
    """In any of the four digits of a score: as a stable sort finds them, ties from the front."""
    bits = 0x3F9D83A1 ^ (whole(mask & 0xFF, 0, 1 << 32, BATCH, HEADS, 70).cpu() & mask)
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int()
    scores = signed.view(torch.float32)
    scores = torch.where(scores.isfinite(), scores, 1.5)  # which the comparison below would have to order too
    signed = scores.view(torch.int32).long()
    keys = torch.where(signed < 0, ~signed - (1 << 31), signed)  # -0.0 below 0.0
    order = keys.sort(dim=2, descending=True, stable=True).indices
    slots = torch.full((BATCH, HEADS, 70), -1, dtype=torch.int32)
    for count in (1, 13, 35, 69):
        expected = torch.zeros(BATCH, HEADS, 70, dtype=torch.uint8, device="cpu").scatter_(2, order[:, :, :count], 1)
        choice = choose(scores.to(DEVICE), count, 0, None, slots, count)
        assert torch.equal(choice.is_chosen.cpu(), expected)


@pytest.mark.parametrize("count", [1, 3, 9])
def test_what_is_not_needed_is_chosen_only_as_a_sink(count):
    scores = torch.full((1, 1, 9), -torch.inf)
    scores[:, :, [4, 7]] = torch.tensor([1.0, 2.0])
    choice = choose(scores, count, 2, None, torch.full((1, 1, 9), -1, dtype=torch.int32), 9)
    assert lists(choice.is_chosen) == [[{1: [0], 3: [0, 1, 7], 9: [0, 1, 4, 7]}[count]]]
    best = pick.choose(scores.clone(), count, 2, None, fewer=True)
    assert sorted(best.ids[best.valid].tolist()) == lists(choice.is_chosen)[0][0]


def test_only_blocks_that_are_open_are_chosen():
    """A captured graph scores the whole capacity, which is more blocks than there are."""
    scores = draw(0, BATCH, HEADS, 50)
    slots = torch.full((BATCH, HEADS, 50), -1, dtype=torch.int32)
    spare = scores.clone()
    spare[:, :, 20:] = 1e9
    choice = choose(spare, 6, 1, None, slots, 6, torch.tensor([20], dtype=torch.int32))
    assert not bool(choice.is_chosen[:, :, 20:].any())
    check_choice(choice._replace(is_chosen=choice.is_chosen[:, :, :20]), scores[:, :, :20], 6, 1, None, slots)


def test_results_go_where_they_are_told_to():
    scores, slots = draw(0, 1, 2, 30), torch.full((1, 2, 30), -1, dtype=torch.int32)
    wanted, missing = torch.full((1, 2, 64), 7, dtype=torch.uint8), torch.full((1, 2, 9), -5, dtype=torch.int32)
    out = Choice(wanted, missing, *torch.empty((2, 1, 2), dtype=torch.int32))
    given = choose(scores, 4, 0, None, slots, 9, out=out)
    assert given is out and bool((wanted[:, :, 30:] == 7).all()) and bool((missing[:, :, 4:] == -5).all())
    check_choice(out._replace(is_chosen=wanted[:, :, :30]), scores, 4, 0, None, slots)


def make_world(seed, blocks, capacity, dtype, size=16, dim=24):
    """A host store, and slots that hold some of its blocks."""
    store = PagedKV(BATCH, HEADS, dim, size, dtype, "cpu", pinned=ON_GPU)
    keys, values = (draw(seed + part, BATCH, HEADS, blocks * size, dim, dtype=dtype) for part in (0, 1))
    for first in range(0, blocks * size, 5 * size):  # in several slabs
        store.append(keys[:, :, first : first + 5 * size].cpu(), values[:, :, first : first + 5 * size].cpu())
    parts = [part.unflatten(2, (-1, size)) for part in (keys, values)]
    ids = lists_of_blocks(seed, BATCH, HEADS, blocks, capacity)
    rows, heads = torch.arange(BATCH)[:, None, None], torch.arange(HEADS)[None, :, None]
    held = [torch.where((ids >= 0)[..., None, None], part[rows, heads, ids.clamp(min=0)], 0) for part in parts]
    return store, parts, ids, [part.contiguous() for part in held]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_recall_brings_what_is_wanted_and_missing(seed, dtype, monkeypatch):
    from scout_hf.stores import pages

    monkeypatch.setattr(pages, "MIN_SLAB_PAGES", 1)
    blocks, capacity = int(whole(seed, 12, 40, 1)), int(whole(seed + 1, 1, 12, 1))
    store, (keys, values), ids, slots = make_world(seed, blocks, capacity, dtype)
    assert len(store.table.pool.slabs) > 1
    slot_of, before = slots_of(ids, blocks), ids.clone()
    choice = choose(draw(seed + 9, BATCH, HEADS, blocks), int(whole(seed + 2, 1, 9, 1)), 1, None, slot_of, 9)
    moves = plan_recall(ids, slot_of, choice)
    copy_blocks(store.table.addresses.to(DEVICE), moves, *slots)
    assert torch.equal(slot_of, slots_of(ids, blocks))
    for row in range(BATCH):
        for head in range(HEADS):
            wanted, held = set(lists(choice.is_chosen)[row][head]), ids[row, head].tolist()
            old = before[row, head].tolist()
            assert len(wanted & set(held)) == min(capacity, len(wanted))
            # What was wanted and had a slot stays in it, and empty slots are used up first.
            assert all(new == was for new, was in zip(held, old) if was in wanted)
            moved = [slot for slot in range(capacity) if held[slot] != old[slot]]
            assert len(moved) == int(moves.counts[row, head])
            if any(old[slot] >= 0 for slot in moved):
                assert -1 not in held
            for slot, block in enumerate(held):
                if block >= 0:
                    assert torch.equal(slots[0][row, head, slot], keys[row, head, block])
                    assert torch.equal(slots[1][row, head, slot], values[row, head, block])


def test_recall_waits_until_the_layer_misses_enough():
    slot_of = torch.full((1, 2, 10), -1, dtype=torch.int32)
    slot_of[0, :, :4] = torch.arange(4, dtype=torch.int32)
    ids = torch.tensor([[[0, 1, 2, 3], [0, 1, 2, 3]]], dtype=torch.int32)
    scores = torch.zeros(1, 2, 10)
    scores[0, 0, :4], scores[0, 1, [0, 1, 2, 7]] = 1.0, 1.0  # one of eight is missing
    choice = choose(scores, 4, 0, None, slot_of, 4)
    assert int(plan_recall(ids, slot_of, choice, share=0.13).counts.sum()) == 0
    assert ids.tolist() == [[[0, 1, 2, 3], [0, 1, 2, 3]]]
    tally = torch.tensor([5])
    assert int(plan_recall(ids, slot_of, choice, 0.13, tally).counts.sum()) == 0 and int(tally) == 5
    moves = plan_recall(ids, slot_of, choice, 0.125, tally)
    assert int(tally) == 6
    assert moves.counts.tolist() == [[0, 1]] and ids.tolist() == [[[0, 1, 2, 3], [0, 1, 2, 7]]]
    assert slot_of[0, 1].tolist() == [0, 1, 2, -1, -1, -1, -1, 3, -1, -1]


def test_whether_recall_is_due_may_be_known_to_the_device_only():
    for share, moved in ((0.3, 0), (0.2, 1)):
        slot_of = torch.tensor([[[0, 1, 2, 3, -1, -1]]], dtype=torch.int32)
        ids = torch.tensor([[[0, 1, 2, 3]]], dtype=torch.int32)
        choice = choose(torch.tensor([[[1.0, 1.0, 1.0, 0.0, 0.0, 1.0]]]), 4, 0, None, slot_of, 4)
        moves = plan_recall(ids, slot_of, choice, torch.tensor([share]))
        assert moves.counts.tolist() == [[moved]] and ids.tolist() == [[[0, 1, 2, 5 if moved else 3]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_block_takes_an_empty_slot(dtype):
    ids = torch.tensor([[[3, -1, 2], [-1, -1, 7]], [[1, 2, 3], [5, 6, -1]]], dtype=torch.int32)
    slot_of, before = slots_of(ids, 12), ids.clone()
    slots = [draw(seed, 2, 2, 3, 16, 24, dtype=dtype) for seed in (0, 1)]
    were = [part.clone() for part in slots]
    tail = draw(2, 2, 2, 2, 40, 24, dtype=dtype)  # a view into a longer tail
    new = tail[0, :, :, 16:32], tail[1, :, :, 16:32]
    adopt_block(9, *new, ids, slot_of, *slots)
    assert ids.tolist() == [[[3, 9, 2], [9, -1, 7]], [[1, 2, 3], [5, 6, 9]]]
    assert torch.equal(slot_of, slots_of(ids, 12))
    for part, was, content in zip(slots, were, new):
        changed = (ids != before)[..., None, None]
        assert torch.equal(part, torch.where(changed, content[:, :, None], was))


def test_a_run_of_blocks_comes_in_order():
    store, (keys, values), _, _ = make_world(0, 12, 3, torch.float32)
    buffers = torch.full((2, BATCH, HEADS, 5, 16, 24), torch.nan)
    copy_blocks(store.table.addresses.to(DEVICE), run_of_blocks(BATCH, HEADS, 6, 4, DEVICE), *buffers)
    assert torch.equal(buffers[0, :, :, :4], keys[:, :, 6:10]) and torch.equal(buffers[1, :, :, :4], values[:, :, 6:10])
    assert bool(buffers[:, :, :, 4].isnan().all())


def test_more_moves_than_programs_and_lists_of_very_different_lengths():
    store, parts, _, _ = make_world(0, 40, 1, torch.float32)
    counts = torch.tensor([[0, 40, 3], [29, 0, 11]], dtype=torch.int32)
    order = torch.stack([torch.randperm(40, device="cpu").int() for _ in range(12)]).view(2, BATCH, HEADS, 40)
    slots, blocks = order.to(DEVICE).masked_fill(torch.arange(40) >= counts[..., None], 1 << 30)
    buffers = torch.full((2, BATCH, HEADS, 40, 16, 24), torch.nan)
    expected = buffers.clone()
    copy_blocks(store.table.addresses.to(DEVICE), Moves(slots, blocks, counts), *buffers)
    for row in range(BATCH):
        for head in range(HEADS):
            here = row, head, slice(int(counts[row, head]))
            for wanted, part in zip(expected, parts):
                wanted[row, head, slots[here].long()] = part[row, head, blocks[here].long()]
    assert torch.equal(buffers.nan_to_num(7e7), expected.nan_to_num(7e7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_goes_where_the_device_says(dtype):
    tail = torch.full((2, 2, 3, 48, 80), torch.nan, dtype=dtype)
    new = draw(0, 2, 1, 6, 80, dtype=dtype).transpose(1, 2).unflatten(1, (2, 3)).unbind(1)
    new = new[0], new[1].contiguous()  # as of a projection of keys and values together, and of one of its own
    append_token(*new, *tail, torch.tensor([7 * 16 + 21]).int(), torch.tensor([7]).int(), 16)
    assert torch.equal(tail[0, :, :, 20:21], new[0]) and torch.equal(tail[1, :, :, 20:21], new[1])
    assert int(tail.isnan().any(-1).sum()) == 2 * 2 * 3 * 47


def test_nothing_missing_moves_nothing():
    slot_of = torch.zeros(1, 1, 3, dtype=torch.int32)
    ids = torch.tensor([[[2, 1, 0]]], dtype=torch.int32)
    choice = choose(torch.ones(1, 1, 3), 3, 0, None, slot_of, 3)
    assert plan_recall(ids, slot_of, choice).counts.tolist() == [[0]] and ids.tolist() == [[[2, 1, 0]]]
