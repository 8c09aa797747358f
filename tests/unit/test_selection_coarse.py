"""Coarse scores: which blocks are scored token by token, by the definition; and what is lost by it."""

from __future__ import annotations

import math
import random

import pytest
import torch

from scout_hf import ScoutConfig
from scout_hf.kernels.cpu import GROUP, Coarse, make_backend
from scout_hf.selection import Selector, SignCode, SignCode2
from scout_hf.selection.coarse import FINE, CoarseCodes, summaries
from scout_hf.selection.group_mass import mean_share
from scout_hf.stores import PagedKV
from tests.libraries import ISAS, using_isa, without_library
from tests.unit.selecting import make_step

BATCH, HEADS, SIZE = 2, 2, 16
pytestmark = pytest.mark.skipif(set(ISAS) <= {"base"}, reason="no native library that scores sign codes fast")


def draw(dim, blocks, group=2, size=SIZE, loud=2.0):
    generator = torch.Generator().manual_seed(dim + blocks)
    keys = torch.randn(BATCH, HEADS, blocks, size, dim, generator=generator) * loud
    return torch.randn(BATCH, HEADS * group, 1, dim, generator=generator) * loud, keys


def coded(kind, keys, mask=None):
    """A digest, the codes of blocks, and those of their summaries."""
    digest = kind()
    digest.fit(keys, mask, None, keys.shape[-1] ** -0.5)
    return digest, digest.encode(keys, mask), digest.encode(summaries(keys, mask, None), None)


def test_two_tokens_stand_for_a_block():
    keys = torch.zeros(1, 1, 1, 4, 2)
    keys[0, 0, 0] = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [2.0, 9.0]])
    others, farthest = summaries(keys, None, None)[0, 0, 0]
    assert others.tolist() == [2.0, 0.0] and farthest.tolist() == [2.0, 9.0]
    # Queries that never look at the second channel do not mind what is far in it.
    _, farthest = summaries(keys, None, torch.tensor([[[1.0, 0.0]]]))[0, 0, 0]
    assert farthest.tolist() in ([1.0, 0.0], [3.0, 0.0])
    mask = torch.tensor([[[True, True, True, False]]])
    _, farthest = summaries(keys, mask, None)[0, 0, 0]
    assert farthest.tolist() in ([1.0, 0.0], [3.0, 0.0])


def test_groups_follow_the_codes_whatever_happens_to_them():
    """Appended one by one and many at a time, cropped, reordered, forked: byte by byte as made anew."""
    dice, code = random.Random(0), 10
    table, made = torch.zeros(BATCH, HEADS, 0, code, dtype=torch.uint8), CoarseCodes()
    for turn in range(200):
        what = dice.choice(["append", "append", "append", "crop", "rows", "fork"])
        if what == "append":
            new = torch.randint(0, 256, (len(table), HEADS, dice.choice([1, 1, 2, 15, 16, 17, 40]), code)).byte()
            table = torch.cat([table, new], dim=2)
        elif what == "crop":
            kept = dice.randint(0, table.shape[2])
            table = table[:, :, :kept]
            made.crop(kept)
        elif what == "rows":
            rows = torch.randint(len(table), (dice.choice([1, 2, 3]),))
            table = table[rows]
            made.select_rows(rows)
        else:
            before, made = made, made.fork()
            before.crop(0)
            before.choice(255 - table.clone(), 0)
        if dice.random() < 0.3 or not table.shape[2]:
            continue
        got = made.choice(table, 0).codes.unflatten(3, (code // 2, GROUP, 2))
        assert got.shape[2] == -(-table.shape[2] // GROUP)
        for block in range(table.shape[2]):
            want = table[:, :, block].unflatten(2, (-1, 2))
            assert torch.equal(got[:, :, block // GROUP, :, block % GROUP], want), (turn, block)


def test_the_window_may_reach_over_blocks_that_were_candidates():
    """A crop that keeps all candidates leaves fewer of them, since the newest blocks are always attended."""
    table, made = torch.randint(0, 256, (BATCH, HEADS, 40, 10)).byte(), CoarseCodes()
    made.choice(table[:, :, :33], 0)
    made.crop(36)
    for blocks in (31, 16, 33, 15, 40, 1):
        got = made.choice(table[:, :, :blocks], 0).codes.unflatten(3, (-1, GROUP, 2))
        assert got.shape[2] == -(-blocks // GROUP)
        for block in range(blocks):
            want = table[:, :, block].unflatten(2, (-1, 2))
            assert torch.equal(got[:, :, block // GROUP, :, block % GROUP], want), (blocks, block)


def oracle(digest, query, codes, two, fine, padding=None):
    """Scores by the summaries, and of the best ``fine`` blocks by these those by their codes; -inf for the others."""
    singles = digest.score(query, two.unflatten(3, (-1, 2)).movedim(4, 2).flatten(2, 3))
    first, second = singles.unflatten(2, (2, -1)).unbind(2)
    masses = torch.logaddexp((first + math.log2(SIZE - 1)) * math.log(2), second * math.log(2)) / math.log(2)
    rough = mean_share(masses, HEADS, padding)
    rough = rough if padding is None else rough.masked_fill(~padding[:, None], -torch.inf)
    best = torch.zeros_like(rough, dtype=torch.bool).scatter(2, rough.topk(fine, dim=2).indices, True)
    own = digest.score(query, codes).masked_fill(~best.repeat_interleave(query.shape[1] // HEADS, 1), -torch.inf)
    return rough, mean_share(own, HEADS, padding)


@pytest.mark.thin(7)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", [SignCode, SignCode2])
@pytest.mark.parametrize("dim", [8, 64, 80])
@pytest.mark.parametrize("group", [1, 3, 6])
@pytest.mark.parametrize("blocks", [33, 48, 100, 700])
@pytest.mark.parametrize("padded", [False, True])
def test_the_library_chooses_by_the_definition(padded, blocks, group, dim, kind, isa):
    """Its logarithms are straight lines between powers of two, so blocks near a border may be on either side."""
    query, keys = draw(dim, blocks, group)
    mask = None
    if padded:
        mask = torch.ones(BATCH, blocks, SIZE, dtype=torch.bool)
        mask[0, :7], mask[1, 8, ::3] = False, False
    digest, codes, two = coded(kind, keys, mask)
    fine, count, near = blocks // 3, 4, 0.3
    padding = None if mask is None else mask.any(-1)
    rough, shares = oracle(digest, query, codes, two, fine, padding)
    # Something else lies between codes, as in a selector's table.
    wide = torch.cat([codes, two], dim=3)[..., : codes.shape[3]]
    coarse = CoarseCodes().choice(two, 0)._replace(fine=fine)
    given = (digest.prepare(query), wide, count, 0, 0, SIZE, None if mask is None else mask.flatten(1))
    with using_isa(isa):
        lists = make_backend("native").select("sign", *given, None, coarse)
        every = make_backend("native").select("sign", *given, None, Coarse(coarse.codes, blocks))
        plain = make_backend("native").select("sign", *given)
    assert lists.counts.tolist() == [[count] * HEADS] * BATCH
    # With all of them fine, coarse codes decide nothing.
    assert torch.equal(every.ids, plain.ids)
    border = rough.topk(fine, dim=2).values[..., -1:]
    best = torch.where(rough >= border + near, shares, -torch.inf).topk(count, dim=2).values[..., -1:]
    chosen = lists.ids.long()
    assert bool((rough.gather(2, chosen) >= border - near).all())
    doubtful = (rough - border).abs() <= near
    # A head whose mass is mostly that of a doubtful block counts more, or less, than in the oracle.
    some = (rough >= border - near).repeat_interleave(group, 1)
    masses = digest.score(query, codes).masked_fill(~some, -torch.inf).mul(math.log(2)).softmax(-1)
    clear = masses.unflatten(1, (HEADS, group)).mul(doubtful[:, :, None]).sum(-1) < 0.2
    fits = (shares.gather(2, chosen) >= best - near) | doubtful.gather(2, chosen)
    assert bool((fits.all(-1) | ~clear.all(-1)).all())


@pytest.mark.parametrize("padded", [False, True])
def test_a_selector_finds_single_tokens_among_many_blocks(padded):
    """A token that a query looks for is far from the others of its block, so its block is scored token by token."""
    blocks, dim = 600, 64
    query, keys = draw(dim, blocks, loud=1.0)
    wanted = query.unflatten(1, (HEADS, -1))[:, :, 0, 0]
    places = torch.tensor([[17, 150, 333, 590], [40, 41, 400, 500]])
    for row in range(BATCH):
        for place, block in enumerate(places[row].tolist()):
            keys[row, :, block, place] = 2.0 * wanted[row]
    keys = keys.flatten(2, 3)
    store = PagedKV(BATCH, HEADS, dim, SIZE, torch.float32, "cpu")
    store.append(keys, keys)
    mask = None
    if padded:
        mask = torch.ones(BATCH, keys.shape[2], dtype=torch.bool)
        mask[0, :90] = False
    config = ScoutConfig(digest="sign2", block_size=SIZE, budget=8 * SIZE, window=0, sinks=0)
    selector = Selector(config, 0, keys)
    selector.extend_from(store, blocks, mask)
    assert selector.table.summaries() is not None and blocks >= 2 * FINE * 8
    step = make_step(keys.shape[2], mask, make_backend("native"))
    seen = []
    select = step.backend.select
    step.backend.select = lambda *args: seen.append(args[-1]) or select(*args)
    lists = selector.lists(step, query, store, blocks)
    assert seen[0].fine == FINE * 8
    for row in range(BATCH):
        for head in range(HEADS):
            assert set(places[row].tolist()) <= set(lists.ids[row, head].tolist())
    # Half the blocks are too few for it to pay.
    selector.lists(step, query, store, 2 * FINE * 8 - 1)
    assert seen[1] is None


def test_codes_of_a_table_without_summaries_go_on_without():
    """Such as those that a GPU made, or a library without fast scores; and the other way round."""
    _, keys = draw(64, 40)
    flat = keys.flatten(2, 3)
    config = ScoutConfig(digest="sign2", block_size=SIZE, budget=SIZE)
    with without_library():
        plain = Selector(config, 0, flat)
    full = Selector(config, 0, flat)
    plain.extend(flat, None)
    full.extend(flat, None)
    assert plain.table.summaries() is None and full.table.summaries() is not None
    assert torch.equal(plain.table.codes(), full.table.codes())
    taken = Selector(config, 0, flat)
    taken.load_state_dict(plain.state_dict(), BATCH, HEADS, 40, torch.device("cpu"))
    taken.extend(flat, None)
    assert taken.blocks == 80 and taken.table.summaries() is None
    assert torch.equal(taken.table.codes()[:, :, 40:], full.table.codes())
    with without_library():
        narrow = Selector(config, 0, flat)
    narrow.load_state_dict(full.state_dict(), BATCH, HEADS, 40, torch.device("cpu"))
    assert narrow.table.summaries() is None and torch.equal(narrow.table.rows(), full.table.codes())
    again = Selector(config, 0, flat)
    again.load_state_dict(full.state_dict(), BATCH, HEADS, 40, torch.device("cpu"))
    assert torch.equal(again.table.rows(), full.table.rows())
