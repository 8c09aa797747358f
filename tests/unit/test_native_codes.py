"""Sign codes and integer digests scored by the native library, against float64; grid.cpp has the exhaustive tests."""

from __future__ import annotations

import pytest
import torch

from scout_hf.kernels.cpu import make_backend
from scout_hf.selection.group_mass import mean_share
from scout_hf.selection.pick import choose, pack_lists
from scout_hf.selection.sign import byte_to_scale
from tests.libraries import ISAS, using_isa

pytestmark = pytest.mark.skipif(not ISAS, reason="no native library")


def make_codes(batch, heads, blocks, size, dim, generator, spare=0):
    """Random signs and scales between 0.7 and 1.4, as a part of a table with ``spare`` more blocks."""
    shape = (batch, heads, blocks + spare, size * (dim // 8 + 1))
    codes = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    codes[..., -size:] = torch.randint(104, 120, (*shape[:3], size), generator=generator, dtype=torch.uint8)
    return codes[:, :, :blocks]


def make_query(batch, heads, dim, generator):
    """Whose products with such codes have a standard deviation of about 4."""
    return torch.randn(batch, heads, 1, dim, generator=generator) * 4 / dim**0.5


def exponents(query, codes, size):
    """Products of the query with what the codes stand for, float64 (batch, kv_heads, group, blocks, block_size)."""
    batch, heads, blocks, _ = codes.shape
    dim = query.shape[-1]
    rows = codes[..., : size * dim // 8].reshape(batch, heads, blocks, dim // 8, 1, size).long()
    bits = rows >> torch.arange(8)[:, None] & 1
    signs = (bits.flatten(3, 4) * 2 - 1).double()
    scale = byte_to_scale(codes[..., size * dim // 8 :]).double()
    grouped = query.double().view(batch, heads, -1, dim)
    return torch.einsum("bhgd,bhndt->bhgnt", grouped, signs) * scale[:, :, None]


def exact(query, codes, size):
    logits = exponents(query, codes, size) * torch.log(torch.tensor(2.0, dtype=torch.float64))
    return (logits.logsumexp(-1) / torch.log(torch.tensor(2.0, dtype=torch.float64))).flatten(1, 2)


def ranks(scores):
    return scores.argsort().argsort().double()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size, dim, group", [(16, 64, 1), (32, 128, 4), (32, 40, 3), (64, 128, 8), (128, 256, 2)])
def test_sign_scores_are_the_formula(isa, size, dim, group):
    generator = torch.Generator().manual_seed(size + dim)
    codes = make_codes(2, 2, 37, size, dim, generator, spare=3)
    query = make_query(2, 2 * group, dim, generator)
    backend = make_backend("native")
    with using_isa(isa):
        scores = backend.score("sign", query, codes, block_size=size)
        turned = query.transpose(2, 3).contiguous().transpose(2, 3)
        assert torch.equal(backend.score("sign", turned, codes, block_size=size), scores)
        assert torch.equal(
            backend.score("sign", query.bfloat16(), codes, block_size=size),
            backend.score("sign", query.bfloat16().float(), codes, block_size=size),
        )
    assert scores.shape == (2, 2 * group, 37) and scores.dtype == torch.float32
    # Powers and logarithms by straight lines, tables of whole numbers.
    assert (scores - exact(query, codes, size)).abs().max() <= 0.18


@pytest.mark.parametrize("isa", ISAS)
def test_sign_scores_rank_blocks_as_exact_ones_do(isa):
    """Keys without any structure, where blocks differ least."""
    generator = torch.Generator().manual_seed(0)
    codes, query = make_codes(1, 2, 1024, 32, 128, generator), make_query(1, 8, 128, generator)
    with using_isa(isa):
        scores = make_backend("native").score("sign", query, codes, block_size=32)
    for found, wanted in zip(scores[0], exact(query, codes, 32)[0]):
        assert torch.corrcoef(torch.stack([ranks(found), ranks(wanted)]))[0, 1] > 0.9995
        best = [set(one.topk(128).indices.tolist()) for one in (found, wanted)]
        assert len(best[0] & best[1]) >= 126


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_native_choice_follows_its_scores(isa, padded):
    generator = torch.Generator().manual_seed(1)
    codes, query = make_codes(3, 2, 70, 16, 32, generator, spare=5), make_query(3, 8, 32, generator)
    mask = torch.arange(70 * 16) >= torch.tensor([0, 333, 70 * 16])[:, None] if padded else None
    backend = make_backend("native")
    with using_isa(isa):
        scores = backend.score("sign", query, codes, block_size=16)
        lists = backend.select("sign", query, codes, 9, 2, 3, 16, mask)
    padding_mask = None if mask is None else mask.unflatten(1, (-1, 16)).any(-1)
    picked = choose(mean_share(scores, 2, padding_mask), 9, 2, padding_mask)
    expected = pack_lists(picked.ids, picked.valid_or_all())
    for row in range(3):
        for head in range(2):
            used = lists.ids[row, head, : lists.counts[row, head]].tolist()
            assert used[-3:] == [70, 71, 72]
            assert used[:-3] == sorted(expected.ids[row, head, : expected.counts[row, head]].tolist())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_garbage_in_a_query_shows_in_the_scores_of_its_own_head(isa, garbage):
    generator = torch.Generator().manual_seed(2)
    codes, query = make_codes(1, 2, 40, 32, 64, generator), make_query(1, 4, 64, generator)
    query[0, 1, 0, 7] = garbage
    query[0, 1, 0, 6] = garbage
    with using_isa(isa):
        backend = make_backend("native")
        scores = backend.score("sign", query, codes, block_size=32)
        assert scores[0, 1].isnan().all() and scores[0, [0, 2, 3]].isfinite().all()
        assert backend.select("sign", query, codes, 5, 0, 0, 32, None).counts.tolist() == [[5, 5]]


@pytest.mark.parametrize("isa", ISAS)
def test_a_query_of_nothing_scores_all_blocks_alike(isa):
    codes = make_codes(1, 1, 40, 32, 64, torch.Generator().manual_seed(3))
    with using_isa(isa):
        scores = make_backend("native").score("sign", torch.zeros(1, 2, 1, 64), codes, block_size=32)
    assert (scores == 5).all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_head_that_needs_a_block_is_not_outvoted(isa):
    """A head whose mass lies in one block gets it, though all others of its group find that block unimportant; also
    where shares are too small for a float."""
    generator = torch.Generator().manual_seed(4)
    codes = make_codes(1, 1, 64, 32, 64, generator)
    signs = (
        torch.stack([codes[0, 0, 40, : 8 * 32].view(8, 32)[:, 5] >> bit & 1 for bit in range(8)], 1).flatten() * 2.0 - 1
    )
    for loud in (2.0, 40.0):
        one = signs * loud / 8
        query = torch.stack([one, -one, -one, -one])[None, :, None]
        with using_isa(isa):
            lists = make_backend("native").select("sign", query, codes, 4, 0, 0, 32, None)
        assert 40 in lists.ids[0, 0].tolist()


def test_what_is_no_sign_code_has_no_native_score():
    backend, query = make_backend("native"), torch.randn(1, 2, 1, 64)
    codes = torch.zeros(1, 2, 4, 32 * 9, dtype=torch.uint8)
    wide = torch.zeros(1, 2, 4, 32 * 9 + 1, dtype=torch.uint8)
    assert backend.score("sign", query, codes, block_size=32) is not None
    assert backend.score("sign", query, wide[..., :-1], block_size=32) is not None  # something lies between the codes
    for one, code, size in (
        (query, codes, 1),
        (query, codes, 16),
        (query, codes.char(), 32),
        (query, codes.float(), 32),
        (query, wide, 32),
        (query, wide[:, :, :, ::2][..., : 32 * 9 // 2], 16),
        (query[..., :60], codes, 32),
        (query.double(), codes, 32),
        (query.expand(2, -1, -1, -1), codes, 32),
        (query[:, :1].expand(-1, 3, -1, -1), codes, 32),
        (query, codes.to("meta"), 32),
    ):
        assert backend.score("sign", one, code, block_size=size) is None
        assert backend.select("sign", one, code, 2, 0, 0, size, None) is None
    assert make_backend("torch").score("sign", query, codes, block_size=32) is None


DTYPES = [torch.int8, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts, numbers", [(1, 256), (4, 64), (3, 8)])
def test_products_are_the_best_of_a_block(isa, dtype, parts, numbers):
    generator = torch.Generator().manual_seed(parts)
    codes = (torch.randn(2, 3, 50, parts * numbers, generator=generator) * 40).clamp(-128, 127).to(dtype)
    weights = torch.randn(2, 3, 1, numbers, generator=generator)
    expected = (codes.double().unflatten(3, (parts, -1)) * weights.double()[..., None, :]).sum(-1).amax(-1)
    with using_isa(isa):
        scores = make_backend("native").score("dots", weights, codes[:, :, :47], block_size=32)
    assert (scores - expected[:, :, :47]).abs().max() <= 3e-6 * expected.abs().max()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("parts, numbers", [(1, 256), (4, 64)])
def test_products_with_four_bits(isa, parts, numbers):
    generator = torch.Generator().manual_seed(parts)
    whole = torch.randint(-8, 8, (2, 3, 50, parts, numbers), generator=generator)
    packed = (whole[..., ::2] & 15 | (whole[..., 1::2] & 15) << 4).to(torch.uint8).flatten(3)
    weights = torch.randn(2, 3, 1, numbers, generator=generator)
    expected = (whole.double() * weights.double()[..., None, :]).sum(-1).amax(-1)
    with using_isa(isa):
        backend = make_backend("native")
        scores = backend.score("dots4", weights, packed, block_size=32)
        assert torch.equal(backend.score("dots4", weights, packed.view(torch.int8), block_size=32), scores)
    assert (scores - expected).abs().max() <= 3e-6 * expected.abs().max()


def test_products_that_do_not_fit_have_no_native_score():
    backend, weights = make_backend("native"), torch.randn(1, 2, 1, 64)
    codes = torch.zeros(1, 2, 4, 128, dtype=torch.int8)
    for scorer, one, code in (
        ("dots", weights, codes[..., :96].contiguous()),
        ("dots", weights, codes[..., :32].contiguous()),
        ("dots", weights.repeat(1, 2, 1, 1), codes),
        ("dots", weights, codes.to(torch.uint8)),
        ("dots4", weights, codes.float()),
        ("dots4", weights, codes[..., :16].contiguous()),
        ("dots", weights[..., :60], torch.zeros(1, 2, 4, 120, dtype=torch.int8)),
    ):
        assert backend.score(scorer, one, code, block_size=32) is None
        assert backend.select(scorer, one, code, 2, 0, 0, 32, None) is None
