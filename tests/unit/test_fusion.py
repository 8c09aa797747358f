"""Fusing partials by log-sum-exp equals attention over the union."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scout_hf.fusion import Partial, empty_like, fuse
from tests.unit.naive import QUICK, attention


def some(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def parts_of(query, keys, values, owner, count, allowed=None, scale=0.5):
    """Attention over the keys of each owner; ``owner`` (batch, heads, tokens) says which part a key belongs to."""
    found = []
    for part in range(count):
        mine = (owner == part).unsqueeze(2)
        mine = mine if allowed is None else mine & allowed
        found.append(Partial(*attention(query, keys, values, scale, allowed=mine)))
    return found


def close(a, b, tolerance):
    for one, other in zip(a, b):
        finite = torch.isfinite(other)
        assert torch.equal(torch.isfinite(one), finite)
        assert torch.equal(one[~finite], other[~finite])
        assert not finite.any() or (one - other)[finite].abs().max() <= tolerance


@QUICK
@given(st.integers(1, 7), st.integers(1, 40), st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 30.0]))
def test_any_partition_equals_the_whole(count, tokens, seed, loudness):
    generator = torch.Generator().manual_seed(seed)
    query, keys = some(seed, 2, 4, 3, 8) * loudness, some(seed + 1, 2, 4, tokens, 8)
    values = some(seed + 2, 2, 4, tokens, 8)
    owner = torch.randint(count, (2, 4, tokens), generator=generator)
    # A third of all rows see nothing at all, whichever part one looks at.
    allowed = (torch.rand(2, 4, 3, 1, generator=generator) > 0.33) & (
        torch.rand(2, 4, 3, tokens, generator=generator) > 0.2
    )
    whole = attention(query, keys, values, 0.5, allowed=allowed)
    close(fuse(parts_of(query, keys, values, owner, count, allowed)), whole, 1e-12 * max(1, loudness))


def test_parts_of_very_different_weight():
    query, keys, values = some(0, 1, 1, 1, 8), some(1, 1, 1, 6, 8), some(2, 1, 1, 6, 8)
    owner = torch.tensor([0, 0, 1, 1, 2, 2]).expand(1, 1, 6)
    for shift in (0, 700, -700, 5000):
        loud = keys.clone()
        loud[:, :, 2:4] += shift * query / query.square().sum()
        whole = attention(query, loud, values, 0.5)
        close(fuse(parts_of(query, loud, values, owner, 3)), whole, 1e-11)


def test_empty_parts_change_nothing_anywhere():
    part = Partial(some(0, 2, 4, 1, 8), some(1, 2, 4, 1))
    empty = empty_like(part.out)
    for order in ([part, empty], [empty, part], [empty, part, empty]):
        close(fuse(order), part, 0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_nothing_but_empty_parts_is_zero_and_minus_infinity(count):
    out, lse = fuse([empty_like(torch.ones(2, 4, 1, 8))] * count)
    assert torch.equal(out, torch.zeros(2, 4, 1, 8)) and bool((lse == -torch.inf).all())


def test_a_row_that_is_empty_in_all_parts_stays_apart_from_its_neighbours():
    one, other = Partial(some(0, 1, 1, 2, 4), some(1, 1, 1, 2)), Partial(some(2, 1, 1, 2, 4), some(3, 1, 1, 2))
    for part in (one, other):
        part.out[..., 1, :], part.lse[..., 1] = 0, -torch.inf
    out, lse = fuse([one, other])
    assert bool((out[..., 1, :] == 0).all()) and bool((lse[..., 1] == -torch.inf).all())
    assert bool(torch.isfinite(out[..., 0, :]).all() & torch.isfinite(lse[..., 0]).all())


@pytest.mark.parametrize("where", ["out", "lse", "out of a part without weight"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_nan_in_any_part_reaches_the_result(where, position):
    parts = [Partial(some(i, 1, 2, 1, 4), some(i + 9, 1, 2, 1)) for i in range(3)]
    getattr(parts[position], where[:3])[0, 1] = torch.nan
    if "without" in where:
        parts[position].lse[:] = -torch.inf
    out, lse = fuse(parts)
    assert bool(out[0, 1].isnan().any())
    assert not bool(out[0, 0].isnan().any() | lse[0, 0].isnan().any())
    assert bool(lse[0, 1].isnan().any()) == (where == "lse")


@QUICK
@given(st.permutations(range(5)), st.integers(0, 10**6))
def test_order_does_not_matter_beyond_rounding(order, seed):
    parts = [
        Partial(some(seed + i, 1, 2, 1, 8, dtype=torch.float32), 9 * some(seed - i - 1, 1, 2, 1).float())
        for i in range(5)
    ]
    close(fuse([parts[i] for i in order]), fuse(parts), 2e-6 * 20)


@QUICK
@given(st.integers(1, 4), st.integers(0, 10**6))
def test_fusing_in_two_stages_is_fusing_at_once(split, seed):
    parts = [Partial(some(seed + i, 1, 2, 1, 8), 9 * some(seed - i - 1, 1, 2, 1)) for i in range(5)]
    close(fuse([fuse(parts[:split]), fuse(parts[split:])]), fuse(parts), 1e-12)


def test_inputs_are_left_alone():
    parts = [Partial(some(i, 1, 2, 1, 8), some(i + 5, 1, 2, 1)) for i in range(3)]
    copies = [Partial(part.out.clone(), part.lse.clone()) for part in parts]
    fuse(parts)
    assert all(torch.equal(a, b) for one, other in zip(parts, copies) for a, b in zip(one, other))


@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("lse", [torch.float32, torch.float64])
def test_results_have_the_precision_of_the_lse(out, lse):
    parts = [Partial(some(i, 1, 2, 1, 8, dtype=out), some(i + 5, 1, 2, 1, dtype=lse)) for i in range(3)]
    fused = fuse(parts)
    assert fused.out.dtype == fused.lse.dtype == lse
    exact = fuse([Partial(part.out.double(), part.lse.double()) for part in parts])
    close(Partial(fused.out.double(), fused.lse.double()), exact, 1e-15 if lse == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_empty_partial_is_wide_enough_and_where_the_query_is(dtype):
    out, lse = empty_like(torch.full((2, 4, 3, 8), torch.nan, dtype=dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.dtype == lse.dtype == wide and out.shape == (2, 4, 3, 8) and lse.shape == (2, 4, 3)
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())
