"""The mean share of attention mass over a GQA group, against float64 and against its purpose."""

from __future__ import annotations

import math

import pytest
import torch

from scout_hf.selection import choose, mean_share

PADDING = {
    "none": None,
    "left": torch.arange(20) >= torch.tensor([0, 7, 19])[:, None],
    "anywhere": torch.arange(20) % torch.tensor([2, 3, 5])[:, None] != 1,
}


def draw(heads=6, blocks=20, spread=5.0, seed=0):
    return torch.randn(3, heads, blocks, generator=torch.Generator().manual_seed(seed)) * spread


def exact(masses, kv_heads, padding_mask):
    natural = masses.double().unflatten(1, (kv_heads, -1)) * math.log(2)
    if padding_mask is not None:
        natural = natural.masked_fill(~padding_mask[:, None, None], -torch.inf)
    return torch.softmax(natural, -1).mean(2)


@pytest.mark.parametrize("group", [1, 2, 6])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("spread", [0.1, 5.0])
def test_it_is_the_mean_of_softmax_shares(group, padding, spread):
    masses, mask = draw(spread=spread), PADDING[padding]
    # Of padding, any mass may be estimated.
    if mask is not None:
        masses = masses.masked_fill(~mask[:, None], 300.0)
    before, kv_heads = masses.clone(), 6 // group
    found, wanted = mean_share(masses, kv_heads, mask), exact(masses, kv_heads, mask)
    assert found.shape == (3, kv_heads, 20) and found.dtype == torch.float32 and torch.equal(masses, before)
    real = torch.ones_like(wanted, dtype=torch.bool) if mask is None else mask[:, None].expand_as(wanted)
    assert (found[real] - wanted[real].log2()).abs().max() < 2e-5
    assert (found.double().exp2() * real).sum(-1).sub(1).abs().max() < 1e-5


def test_one_head_ranks_by_its_own_mass():
    masses = draw(heads=2)
    assert torch.equal(mean_share(masses, 2, None).argsort(), masses.argsort())


@pytest.mark.parametrize("padding", PADDING)
def test_blocks_that_are_not_there_take_no_share(padding):
    """As those behind the last one of a buffer."""
    masses, mask = draw(), PADDING[padding]
    longer = torch.cat([masses, torch.full((3, 6, 5), -torch.inf)], -1)
    more = None if mask is None else torch.cat([mask, torch.ones(3, 5, dtype=torch.bool)], -1)
    found = mean_share(longer, 2, more)
    assert bool((found[:, :, 20:] == -torch.inf).all())
    torch.testing.assert_close(found[:, :, :20], mean_share(masses, 2, mask))


def test_shares_too_small_for_a_float_have_an_order():
    masses = -300.0 * torch.arange(8).expand(1, 3, 8)
    found = mean_share(masses, 1, None)
    assert found[0, 0].tolist() == pytest.approx([-300.0 * block for block in range(8)], rel=1e-5)


def test_a_row_of_only_padding_chooses_nothing_and_changes_no_other():
    masses, mask = draw(), torch.ones(3, 20, dtype=torch.bool)
    mask[1] = False
    found = mean_share(masses, 2, mask)
    torch.testing.assert_close(found[[0, 2]], mean_share(masses[[0, 2]], 2, None))
    assert not choose(found, 4, 1, mask).valid_or_all()[1].any()


def test_a_head_is_not_outvoted():
    """Half of one head's mass lies in the last block, of which seven others think nothing."""
    masses = torch.zeros(1, 8, 16)
    masses[0, 1:, 15], masses[0, 0, 15] = -40.0, 4.0
    assert mean_share(masses, 1, None)[0, 0].argmax() == 15
    assert masses.sum(1)[0].argmin() == 15


def test_garbage_of_one_head_is_seen():
    masses = draw()
    masses[1, 4] = torch.nan
    found = mean_share(masses, 2, None)
    assert found[1, 1].isnan().all() and found[[0, 2]].isfinite().all() and found[1, 0].isfinite().all()
