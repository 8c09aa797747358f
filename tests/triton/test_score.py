"""Kernels that score digests, against float64: no further from it than twice what the torch reference is."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from scout_hf.kernels.triton import score_sign  # noqa: E402
from scout_hf.kernels.triton.score import score  # noqa: E402
from scout_hf.selection import make_digest  # noqa: E402
from scout_hf.selection.sign import byte_to_scale  # noqa: E402
from tests.triton.grid import DEVICE  # noqa: E402
from tests.triton.keys import DIMS, DTYPES, GROUPS, SIZES, draw, fitted, some_padding  # noqa: E402

# Of the sum of a score's terms without their signs: what any order of float32 sums may leave.
TINY = 2.0**-20


def minmax_exact(query, codes):
    """Scores in float64, and the sums of their terms without signs."""
    batch, heads, _, code = codes.shape
    grouped = query.double().view(batch, heads, -1, code // 2)
    weights = torch.cat([grouped.clamp(min=0).sum(2), grouped.clamp(max=0).sum(2)], dim=-1)[:, :, None]
    return (codes.double() * weights).sum(-1), (codes.double() * weights).abs().sum(-1)


def dots_exact(weights, codes):
    """The same for rows of numbers, (batch, heads, blocks, rows * n)."""
    terms = codes.double().unflatten(3, (-1, weights.shape[-1])) * weights.double()[:, :, :, None]
    return terms.sum(-1).amax(3), terms.abs().sum(-1).amax(3)


def sign_exact(query, codes, size):
    """Scores in float64, and what the pieces of the query may leave: 2**-16 of its length times a token's scale."""
    batch, heads, _, _ = codes.shape
    dim = query.shape[-1]
    grouped = query.double().view(batch, heads, -1, dim)
    rows = codes[..., : dim // 8 * size].unflatten(3, (dim // 8, size))
    signs = torch.stack([rows >> bit & 1 for bit in range(8)], 4).transpose(3, 5).flatten(4, 5)
    # Now (batch, heads, blocks, size, 8 bits x dim / 8 bytes): to channels in order.
    signs = signs.unflatten(4, (8, dim // 8)).transpose(4, 5).flatten(4).double() * 2 - 1
    scale = byte_to_scale(codes[..., dim // 8 * size :]).double()
    logits = torch.einsum("bhgd,bhntd->bhgnt", grouped, signs) * scale[:, :, None]
    exact = torch.log2(torch.exp2(logits - logits.amax(-1, keepdim=True)).sum(-1)) + logits.amax(-1)
    slack = 2.0**-16 * grouped.norm(dim=-1)[..., None] * scale.amax(-1)[:, :, None]
    return exact.flatten(1, 2), slack.flatten(1, 2)


def check(got, reference, exact, slack):
    """That a kernel is right to twice the largest error of the reference, and ``slack``."""
    assert got.dtype == torch.float32 and got.shape == exact.shape
    errors, allowed = (got.double() - exact).abs(), (reference.double() - exact).abs().amax()
    assert bool((errors <= 2 * allowed + slack).all()), f"{errors.max()} off, where the reference is {allowed}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group, dim, blocks", [*zip(GROUPS, (*DIMS, 128, 64), (1, 31, 97, 7, 67, 33, 131))])
def test_minmax(group, dim, blocks, dtype):
    query, keys = draw(group, 2, 2, group, blocks, 8, dim, dtype)
    for padding_mask in (None, some_padding(2, blocks, 8)):
        digest = make_digest("minmax")
        codes = digest.encode(keys, padding_mask)
        exact, terms = minmax_exact(query, codes)
        check(score("minmax", query, codes), digest.score(query, codes), exact, TINY * terms + 1e-30)


def test_minmax_where_half_precision_overflows():
    query, keys = draw(0, 1, 1, 8, 6, 8, 128, torch.float16, loud=30.0)
    codes = make_digest("minmax").encode(keys, None)
    exact, terms = minmax_exact(query, codes)
    assert exact.max() > torch.finfo(torch.float16).max
    assert bool(((score("minmax", query, codes) - exact).abs() <= TINY * terms).all())


@pytest.mark.parametrize("name", ["minmax-int8", "minmax-sub"])
@pytest.mark.parametrize(
    "group, dim, size, blocks", [*zip(GROUPS, (*DIMS, 96, 128), (*SIZES, 8), (1, 31, 17, 7, 5, 2, 67))]
)
def test_rows_of_whole_numbers(name, group, dim, size, blocks):
    query, keys = draw(group, 2, 2, group, blocks, size, dim)
    digest = fitted(name, keys, padding_mask=some_padding(2, blocks, size))
    codes = digest.encode(keys, some_padding(2, blocks, size))
    exact, terms = dots_exact(digest.prepare(query), digest.load(codes))
    got = score(digest.native, digest.prepare(query), codes)
    check(got, digest.score(query, codes), exact, TINY * terms)


def test_every_whole_number():
    """All bytes, and all pairs of halves, give exactly what they stand for."""
    codes = torch.arange(256, device=DEVICE).to(torch.uint8).view(1, 1, 16, 16)
    for at in range(16):
        weights = torch.zeros(1, 1, 1, 16, device=DEVICE)
        weights[..., at] = 3.0
        assert torch.equal(score("dots", weights, codes.view(torch.int8)), codes.view(torch.int8)[..., at] * 3.0)
    halves = make_digest("minmax-sub").load(codes)
    for at in range(32):
        weights = torch.zeros(1, 1, 1, 32, device=DEVICE)
        weights[..., at] = 3.0
        assert torch.equal(score("dots4", weights, codes), halves[..., at] * 3.0)
        assert torch.equal(score("dots4", weights, codes.view(torch.int8)), halves[..., at] * 3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width, rows", [(24, 1), (64, 3), (160, 5)])
def test_rows_of_floats(width, rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randn(2, 3, 19, rows * width, generator=generator).to(DEVICE, dtype)
    weights = torch.randn(2, 3, 1, width, generator=generator).to(DEVICE)
    exact, terms = dots_exact(weights, codes)
    parts = codes.float().unflatten(3, (rows, width))
    check(score("dots", weights, codes), (parts * weights[:, :, :, None]).sum(-1).amax(3), exact, TINY * terms)


@pytest.mark.parametrize(
    "group, dim, size, blocks",
    [*zip(GROUPS, (*DIMS, 128, 64), (*SIZES, 32), (1, 11, 5, 3, 2, 1, 7)), (4, 24, 16, 9), (1, 128, 2, 37)],
)
@pytest.mark.parametrize("name", ["sign", "sign2"])
def test_sign(name, group, dim, size, blocks):
    if name == "sign2" and dim > 128:
        pytest.skip("codes of two bits are those of twice as many channels, of which a kernel takes 256")
    query, keys = draw(group, 2, 1, group, blocks, size, dim)
    digest = fitted(name, keys, query)
    codes = digest.encode(keys, None)
    prepared = digest.prepare(query)
    exact, slack = sign_exact(prepared, codes, size)
    check(score("sign", prepared, codes, size), digest.score(query, codes), exact, slack)


@pytest.mark.parametrize("loud", [1e-9, 300.0, 1e12])
def test_sign_with_queries_of_any_size(loud):
    query, keys = draw(0, 1, 2, 2, 5, 16, 64)
    digest = fitted("sign", keys, query)
    codes = digest.encode(keys, None)
    prepared = digest.prepare(query) * loud
    exact, slack = sign_exact(prepared, codes, 16)
    assert bool(((score("sign", prepared, codes, 16) - exact).abs() <= slack + 1e-5).all())


@pytest.mark.parametrize("group", [1, 3])
def test_heads_that_only_fill_a_tile_do_not_count(group):
    """A head with a query of zeros gets log2(size); those that pad the tensor-core tile write nothing."""
    codes = torch.randint(256, (1, 1, 3, 8 * 9), device=DEVICE).to(torch.uint8)
    out = torch.full((1, 16, 3), 7.0, device=DEVICE)
    got = score("sign", torch.zeros(1, group, 1, 64, device=DEVICE), codes, 8, out=out[:, :group])
    assert got.shape == (1, group, 3) and bool(((got - 3.0).abs() <= 1e-5).all())
    assert bool((out[:, group:] == 7.0).all())


def test_many_tiles_in_one_program(monkeypatch):
    """Where there are programs enough, each goes through several tiles; some of the last have none left."""
    monkeypatch.setattr(score_sign, "ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(score_sign, "MOST_TILES", 4)
    codes = torch.randint(256, (1, 2, 37, 8 * 9), device=DEVICE).to(torch.uint8)
    query = torch.randn(1, 4, 1, 64, device=DEVICE)
    exact, slack = sign_exact(query, codes, 8)
    assert bool(((score("sign", query, codes, 8) - exact).abs() <= slack + 1e-5).all())
    count = torch.tensor([19], dtype=torch.int32, device=DEVICE)
    got = score("sign", query, codes, 8, count=count)
    assert bool((got[:, :, 19:] == -torch.inf).all())
    assert bool(((got - exact).abs() <= slack + 1e-5)[:, :, :19].all())


# -- buffers ---------------------------------------------------------------------------------------------------------

SCORERS = ("minmax", "dots", "dots4", "sign")


def example(scorer, capacity=13, batch=2, heads=2):
    """A prepared query, and codes that fill a buffer."""
    generator = torch.Generator().manual_seed(capacity)
    query = torch.randn(batch, heads * (1 if "dots" in scorer else 3), 1, 64, generator=generator)
    code = {"minmax": 128, "dots": 128, "dots4": 64, "sign": 8 * 9}[scorer]
    codes = torch.randint(-128, 128, (batch, heads, capacity, code), generator=generator)
    types = {"minmax": torch.bfloat16, "dots": torch.int8, "dots4": torch.uint8, "sign": torch.uint8}
    return query.to(DEVICE), codes.to(types[scorer]).to(DEVICE)


@pytest.mark.parametrize("scorer", SCORERS)
def test_part_of_a_larger_buffer(scorer):
    query, codes = example(scorer)
    expected = score(scorer, query, codes, 8)
    rubbish = torch.nan if codes.is_floating_point() else 255 if codes.dtype == torch.uint8 else 127
    size = codes.shape[3]
    wide = torch.full((3, 5, 40, size + 16), rubbish, dtype=codes.dtype, device=DEVICE)
    by_block = torch.full((2, 13, 3, size + 16), rubbish, dtype=codes.dtype, device=DEVICE)
    for view in (wide[1:, 1:4:2, 3:16, :size], by_block.transpose(1, 2)[:, 1:, :, :size]):
        view.copy_(codes)
        assert torch.equal(score(scorer, query, view, 8), expected)
    strided = torch.zeros(*query.shape[:3], 128, device=DEVICE)[..., ::2].copy_(query)
    assert torch.equal(score(scorer, strided, codes, 8), expected)


@pytest.mark.parametrize("known", [0, 1, 7, 13, 20])
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.thin(2)
def test_blocks_that_do_not_exist_yet(scorer, known):
    query, codes = example(scorer)
    expected = score(scorer, query, codes, 8)
    codes[:, :, known:] = torch.nan if codes.is_floating_point() else 255 if codes.dtype == torch.uint8 else 127
    lists = 6 if scorer == "sign" else 2
    out = torch.full((2, lists, 16), 7.0, device=DEVICE)
    count = torch.tensor([known], dtype=torch.int32, device=DEVICE)
    got = score(scorer, query, codes, 8, out=out, count=count)
    assert got.data_ptr() == out.data_ptr() and got.shape == (2, lists, 13)
    assert torch.equal(got[:, :, :known], expected[:, :, :known])
    assert bool((got[:, :, known:] == -torch.inf).all()) and bool((out[:, :, 13:] == 7.0).all())
    # The same launch serves a longer context.
    count.fill_(min(known, 12) + 1)
    again = score(scorer, query, codes, 8, out=out, count=count)
    assert bool((again[:, :, min(known, 12) + 1 :] == -torch.inf).all())


@pytest.mark.parametrize("scorer", ["dots4", "sign"])
def test_buffers_of_more_than_2_31_elements(scorer):
    buffer = torch.empty(2**31 + 2**24, dtype=torch.uint8, device=DEVICE)
    for capacity, heads, strides in ((3, 3, (2**12, 2**30, 2**8)), (129, 1, (0, 0, 2**24))):
        query, codes = example(scorer, capacity, 1, heads)
        far = buffer.as_strided(codes.shape, (*strides, 1))
        far.copy_(codes)
        assert torch.equal(score(scorer, query, far, 8), score(scorer, query, codes, 8))


def test_queries_in_half_precision():
    for scorer in SCORERS:
        query, codes = example(scorer)
        for dtype in (torch.bfloat16, torch.float16):
            half = query.to(dtype)
            assert torch.equal(score(scorer, half, codes, 8), score(scorer, half.float(), codes, 8))


def test_what_no_kernel_knows_is_left_to_the_caller():
    query, codes = example("minmax")
    assert score("median", query, codes) is None
    assert score("minmax", query.double(), codes) is None and score("minmax", query, codes.double()) is None
    assert score("minmax", query, codes[..., :64]) is None and score("minmax", query[:, :5], codes) is None
    query, codes = example("sign")
    assert score("sign", query, codes) is None and score("sign", query, codes, 16) is None
    assert score("sign", query, codes.view(torch.int8), 8) is None
    query, codes = example("dots4")
    assert score("dots4", query, codes[..., :20]) is None and score("dots4", query, codes.float()) is None
    assert score("dots", query, codes) is None
    assert score("dots", query, torch.zeros(2, 2, 1, 64 * 500, dtype=torch.int8, device=DEVICE)) is None


def test_no_blocks_and_wrong_buffers():
    query, codes = example("minmax")
    assert score("minmax", query, codes[:, :, :0]).shape == (2, 2, 0)
    for wrong in (torch.empty(2, 2, 12), torch.empty(2, 1, 13), torch.empty(2, 2, 13, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"float32 of at least \(2, 2, 13\)"):
            score("minmax", query, codes, out=wrong.to(DEVICE))
