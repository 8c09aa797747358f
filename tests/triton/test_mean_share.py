"""One launch for the mean share of a group, against float64: no further from it than twice what the torch one is."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")

from scout_hf.kernels.triton import mean_share  # noqa: E402
from scout_hf.selection import group_mass  # noqa: E402
from tests.triton.grid import DEVICE, chance, draw  # noqa: E402

BATCH, KV_HEADS = 2, 3


def exact(masses, padding_mask, recent):
    natural = masses.double().unflatten(1, (KV_HEADS, -1)) * math.log(2)
    if padding_mask is not None:
        natural = natural.masked_fill(~padding_mask[:, None, None], -torch.inf)
    whole = natural.logsumexp(-1, keepdim=True)
    if recent is not None:
        whole = torch.logaddexp(whole, recent.double().unflatten(1, (KV_HEADS, -1))[..., None] * math.log(2))
    shares = natural - whole
    return (shares.logsumexp(2) - math.log(shares.shape[2])) / math.log(2)


def masses_of(group, blocks, spread=6.0, seed=0):
    """A view of a longer buffer, with something else behind the blocks."""
    buffer = draw(seed, BATCH, KV_HEADS * group, blocks + 3) * spread
    buffer[:, :, blocks:] = torch.nan
    return buffer[:, :, :blocks]


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("newer", [False, True], ids=["", "newer"])
@pytest.mark.parametrize("group, blocks, spread", [(1, 1, 6.0), (4, 700, 0.1), (7, 1025, 6.0), (17, 33, 60.0)])
def test_it_is_the_mean_of_softmax_shares(group, blocks, spread, padded, newer):
    masses, recent, mask = masses_of(group, blocks, spread), None, None
    if newer:
        recent = draw(1, BATCH, KV_HEADS * group) * spread
        recent[0, 0] = -torch.inf  # a row without newer tokens
    if padded:
        mask = chance(2, 0.6, BATCH, blocks)
        mask[:, -1] = True
    wanted = exact(masses, mask, recent)
    reference = group_mass.mean_share(masses, KV_HEADS, mask, recent)
    found = mean_share(masses, KV_HEADS, mask, recent)
    real = torch.ones_like(wanted, dtype=torch.bool) if mask is None else mask[:, None].expand_as(wanted)
    allowed = 2 * (reference.double() - wanted)[real].abs().max() + 2.0**-21 * wanted[real].abs().max()
    assert (found.double() - wanted)[real].abs().max() <= allowed


def test_blocks_that_are_not_there_take_no_share():
    masses = masses_of(4, 90)
    longer = torch.cat([masses, torch.full((BATCH, KV_HEADS * 4, 40), -torch.inf, device=DEVICE)], -1)
    found = mean_share(longer, KV_HEADS, None)
    assert bool((found[:, :, 90:] == -torch.inf).all())
    torch.testing.assert_close(found[:, :, :90], mean_share(masses, KV_HEADS, None))


def test_garbage_of_one_head_is_seen_and_no_other_group_changes():
    masses = masses_of(4, 50).clone()
    before = mean_share(masses, KV_HEADS, None)
    masses[1, 5] = torch.nan
    found = mean_share(masses, KV_HEADS, None)
    assert bool(found[1, 1].isnan().all())
    before[1, 1] = found[1, 1] = 0.0
    assert torch.equal(before, found)


def test_a_row_of_only_padding_changes_no_other():
    masses, mask = masses_of(2, 40), torch.ones(BATCH, 40, dtype=torch.bool, device=DEVICE)
    mask[1] = False
    assert torch.equal(mean_share(masses, KV_HEADS, mask)[0], mean_share(masses, KV_HEADS, None)[0])


def test_shares_too_small_for_a_float_have_an_order():
    masses = -300.0 * torch.arange(8, device=DEVICE).expand(1, 3, 8)
    assert mean_share(masses, 1, None)[0, 0].tolist() == pytest.approx([-300.0 * block for block in range(8)], rel=1e-5)
