"""Coarse scores: which blocks are scored token by token, by the definition; and what is lost by it."""

from __future__ import annotations

import math

import pytest
import torch

from scout_hf import ScoutConfig
from scout_hf.kernels.cpu import Coarse, make_backend
from scout_hf.selection import MinMax, Selector, SignCode, SignCode2
from scout_hf.selection.coarse import FINE, WORTH, coarse_for
from scout_hf.selection.group_mass import mean_share
from scout_hf.stores import PagedKV
from tests.libraries import ISAS, using_isa
from tests.unit.selecting import make_step

BATCH, HEADS, SIZE = 2, 2, 16
pytestmark = pytest.mark.skipif(set(ISAS) <= {"base"}, reason="no native library that scores sign codes fast")


def draw(dim, blocks, group=2, size=SIZE, loud=2.0):
    generator = torch.Generator().manual_seed(dim + blocks)
    keys = torch.randn(BATCH, HEADS, blocks, size, dim, generator=generator) * loud
    return torch.randn(BATCH, HEADS * group, 1, dim, generator=generator) * loud, keys


def coded(kind, keys, mask=None):
    """A digest, and the codes of blocks."""
    digest = kind()
    digest.fit(keys, mask, None, keys.shape[-1] ** -0.5)
    return digest, digest.encode(keys, mask)


def by_first(digest, query, codes, dim):
    """Scores by the first ``dim`` dimensions of the codes, of which each byte has eight: of the best token, roughly.

    A token's sum is made of summands of four dimensions each, rounded so that it is within 127 of 0, and its scale has
    4 bits times a power of two.
    """
    rows = digest.prepare(query)[..., :dim].unflatten(1, (HEADS, -1)).squeeze(3).double()
    unit = rows.abs().sum(-1) / (127 - dim // 8)
    signs = codes[..., : SIZE * dim // 8].unflatten(3, (-1, SIZE)).transpose(3, 4)
    bits = ((signs[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(4).double() * 2 - 1
    parts = torch.einsum("bhgid,bhntid->bhgnti", rows.unflatten(-1, (-1, 4)), bits.unflatten(-1, (-1, 4)))
    sums = (parts / unit[..., None, None, None]).round().sum(-1).long()
    bytes_ = codes[..., -SIZE:].long()
    factors = (16 + bytes_ % 16) * 4 * (2 ** (bytes_ // 16 - 3).clamp(min=0)).clamp(max=255)
    logits = sums * 256 * factors[:, :, None] >> 16
    return (logits.amax(-1) * unit[..., None] / 4).flatten(1, 2).float()


def oracle(digest, query, codes, dim, fine, padding=None):
    """Scores by the first dimensions, and of the best ``fine`` blocks by these by whole codes; -inf for others."""
    rough = mean_share(by_first(digest, query, codes, dim), HEADS, padding)
    rough = rough if padding is None else rough.masked_fill(~padding[:, None], -torch.inf)
    best = torch.zeros_like(rough, dtype=torch.bool).scatter(2, rough.topk(fine, dim=2).indices, True)
    own = digest.score(query, codes).masked_fill(~best.repeat_interleave(query.shape[1] // HEADS, 1), -torch.inf)
    return rough, mean_share(own, HEADS, padding)


@pytest.mark.thin(7)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [8, 64, 80])
@pytest.mark.parametrize("group", [1, 3, 6])
@pytest.mark.parametrize("blocks", [33, 48, 100, 700])
@pytest.mark.parametrize("padded", [False, True])
def test_the_library_chooses_by_the_definition(padded, blocks, group, dim, isa):
    """Its logarithms are straight lines between powers of two, so blocks near a border may be on either side."""
    query, keys = draw(dim, blocks, group)
    mask = None
    if padded:
        mask = torch.ones(BATCH, blocks, SIZE, dtype=torch.bool)
        mask[0, :7], mask[1, 8, ::3] = False, False
    digest, codes = coded(SignCode2, keys, mask)
    fine, count, near = blocks // 3, 4, 0.3
    padding = None if mask is None else mask.any(-1)
    rough, shares = oracle(digest, query, codes, dim, fine, padding)
    # Something else lies between codes.
    wide = torch.cat([codes, codes[..., :3]], dim=3)[..., : codes.shape[3]]
    given = (digest.prepare(query), wide, count, 0, 0, SIZE, None if mask is None else mask.flatten(1))
    with using_isa(isa):
        lists = make_backend("native").select("sign", *given, None, Coarse(dim, fine))
        every = make_backend("native").select("sign", *given, None, Coarse(dim, blocks))
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


def needles(keys, query, places, aside):
    """Tokens that a query looks for: of a block the farthest from its mean, or, ``aside``, one behind a farther one."""
    wanted = query.unflatten(1, (HEADS, -1))[:, :, 0, 0]
    other = torch.linalg.qr(torch.stack([wanted, torch.ones_like(wanted)], dim=-1))[0][..., 1]
    for row in range(BATCH):
        for place, block in enumerate(places[row].tolist()):
            keys[row, :, block, place] = 2.0 * wanted[row]
            if aside:
                keys[row, :, block, place + 4] = 40.0 * other[row]
                keys[row, :, block, place + 8] = -40.0 * other[row] - 2.0 * wanted[row]


@pytest.mark.parametrize("aside", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_selector_finds_single_tokens_among_many_blocks(padded, aside):
    """Whatever else is in their blocks: a mean and the farthest token say nothing of them."""
    blocks, dim = 600, 64
    query, keys = draw(dim, blocks, loud=1.0)
    places = torch.tensor([[17, 150, 333, 590], [40, 41, 400, 500]])
    needles(keys, query, places, aside)
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
    step = make_step(keys.shape[2], mask, make_backend("native"))
    seen = []
    select = step.backend.select
    step.backend.select = lambda *args: seen.append(args[-1]) or select(*args)
    lists = selector.lists(step, query, store, blocks)
    assert seen[0] == Coarse(dim, FINE * 8) and blocks >= WORTH * FINE * 8
    for row in range(BATCH):
        for head in range(HEADS):
            assert set(places[row].tolist()) <= set(lists.ids[row, head].tolist())
    # Half the blocks are too few for it to pay.
    selector.lists(step, query, store, WORTH * FINE * 8 - 1)
    assert seen[1] is None


def test_codes_of_one_plane_are_all_read():
    assert coarse_for(SignCode(), 64, 100_000, 8) is None and coarse_for(MinMax(), 64, 100_000, 8) is None
    assert coarse_for(SignCode2(), 64, 100_000, 0) == Coarse(64, FINE)
    assert coarse_for(SignCode2(), 256, 100_000, 8) and coarse_for(SignCode2(), 264, 100_000, 8) is None
