"""attend() against float64 over dtypes, GQA ratios, sizes, masks and soft caps, next to stock torch."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention, softmax

from scout_hf.errors import UnsupportedInputError
from scout_hf.kernels.attend import attend, fold_group, unfold_group
from tests.unit.naive import attention

BATCH, KV_HEADS, TOKENS = 2, 2, 37
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # a unit in the last place, or a few
LSE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}
MASKS = ["none", "per key", "per KV head", "per query", "per head and query", "rows without keys", "causal"]


def inputs(seed, dtype, group, queries, tokens, dim, kv_heads=KV_HEADS):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(kv_heads * group, queries), (kv_heads, tokens), (kv_heads, tokens)]
    return [torch.randn(BATCH, heads, n, dim, generator=generator).to(dtype) for heads, n in sizes]


def mask_of(kind, seed, queries, tokens):
    shape = {"per key": (BATCH, 1, 1), "per KV head": (BATCH, KV_HEADS, 1), "per query": (BATCH, 1, queries)}
    if kind in ("none", "causal"):
        return None
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.rand(*shape.get(kind, (BATCH, KV_HEADS, queries)), tokens, generator=generator) > 0.4
    if kind == "rows without keys":
        allowed[torch.rand(allowed.shape[:3], generator=generator) > 0.5] = False
        allowed[0, 0, 0] = False
    else:
        allowed[..., tokens // 2] = True
    return allowed


def stock(query, keys, values, scale, softcap, allowed, causal):
    """What transformers computes with torch in the dtype of the inputs: sdpa, or products under a soft cap."""
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    if causal:
        allowed = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool).tril()
    elif allowed is not None:
        allowed = allowed.expand(-1, KV_HEADS, -1, -1).repeat_interleave(group, 1)
    if softcap is None:
        return scaled_dot_product_attention(query, keys, values, attn_mask=allowed, scale=scale)
    scores = torch.tanh(query @ keys.transpose(-1, -2) * scale / softcap) * softcap
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return softmax(scores, dim=-1, dtype=torch.float32).nan_to_num().to(query.dtype) @ values


def check(query, keys, values, scale, softcap, allowed, causal):
    got = attend(query, keys, values, scale, softcap, allowed, causal)
    out, lse = attention(query, keys, values, scale, softcap, allowed, causal)
    empty = torch.isneginf(lse)
    assert got.out.shape == query.shape and got.lse.shape == query.shape[:3]
    assert got.lse.dtype == torch.float32
    assert torch.finfo(got.out.dtype).eps <= torch.finfo(query.dtype).eps
    assert torch.equal(got.lse == -torch.inf, empty)
    assert bool((got.out[empty] == 0).all())
    if empty.all():
        return
    usual = stock(query, keys, values, scale, softcap, allowed, causal).double()
    error = (got.out.double() - out)[~empty].abs().max()
    allowed_error = 2 * (usual - out)[~empty].abs().max() + FLOOR[query.dtype]
    assert error <= allowed_error, (error, allowed_error)
    assert (got.lse.double() - lse)[~empty].abs().max() <= LSE_ERROR[query.dtype]


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["no cap", "capped"])
@pytest.mark.parametrize("dim", [20, 32, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_close_to_float64(dtype, dim, softcap):
    cases = itertools.product([1, 2, 4, 8], [1, 3, 17], MASKS)
    for seed, (group, queries, kind) in enumerate(cases):
        tokens = queries if kind == "causal" else TOKENS
        given = inputs(seed, dtype, group, queries, tokens, dim)
        allowed = mask_of(kind, seed, queries, tokens)
        check(*given, dim**-0.5 * 1.5, softcap, allowed, kind == "causal")


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("tokens", [1, 31, 512, 513, 1500])
@pytest.mark.parametrize("group", [1, 4])
def test_lengths_around_the_tiles_of_the_kernel(tokens, group, softcap):
    given = inputs(tokens, torch.float32, group, 1, tokens, 64)
    for kind in ("none", "per KV head", "rows without keys"):
        check(*given, 0.2, softcap, mask_of(kind, 1, 1, tokens), False)


def test_float64_stays_float64():
    query, keys, values = inputs(0, torch.float64, 2, 3, 20, 32)
    for softcap in (None, 5.0):
        got, expected = attend(query, keys, values, 0.2, softcap), attention(query, keys, values, 0.2, softcap)
        assert got.out.dtype == got.lse.dtype == torch.float64
        for one, other in zip(got, expected):
            assert (one - other).abs().max() <= 1e-13


def test_the_log_is_natural():
    query, values = torch.zeros(1, 1, 1, 8), torch.randn(1, 1, 5, 8)
    for softcap in (None, 3.0):
        assert attend(query, torch.randn(1, 1, 5, 8), values, 1.0, softcap).lse.item() == pytest.approx(math.log(5))


def test_the_cap_comes_before_the_mask_and_bounds_every_score():
    query, keys, values = inputs(0, torch.float32, 2, 1, 9, 16)
    allowed = mask_of("per key", 0, 1, 9)
    lse = attend(query * 1000, keys, values, 1.0, 2.0, allowed).lse
    assert bool((lse <= 2.0 + math.log(9)).all()) and bool(torch.isfinite(lse).all())


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_no_key_that_may_be_seen_at_all(softcap):
    query, keys, values = inputs(0, torch.float32, 4, 3, 12, 32)
    out, lse = attend(query, keys, values, 0.2, softcap, torch.zeros(BATCH, 1, 1, 12, dtype=torch.bool))
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())


def test_no_keys_at_all():
    # In a separate process: the kernel of torch divides by the number of keys, which ends the process.
    code = """
import torch
from scout_hf.kernels.attend import attend
for softcap in (None, 5.0):
    out, lse = attend(torch.ones(2, 4, 3, 32), torch.ones(2, 2, 0, 32), torch.ones(2, 2, 0, 32), 0.2, softcap)
    assert out.shape == (2, 4, 3, 32) and bool((out == 0).all()) and bool((lse == -torch.inf).all())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 12), (1, 2, 1, 12), (2, 1, 3, 12), (1, 1, 3, 12), (2, 2, 1, 1)])
def test_masks_of_every_broadcast(shape, softcap):
    query, keys, values = inputs(0, torch.float32, 4, 3, 12, 32)
    allowed = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    wide = allowed.expand(BATCH, KV_HEADS, 3, 12)
    got, expected = (attend(query, keys, values, 0.2, softcap, mask) for mask in (allowed, wide))
    for one, other in zip(got, expected):
        assert torch.equal(torch.isfinite(one), torch.isfinite(other))
        assert (one - other).nan_to_num(0, 0, 0).abs().max() <= 1e-6


@pytest.mark.parametrize("which", ["query", "keys", "values"])
@pytest.mark.parametrize("layout", ["heads inside", "every other number", "cut out", "expanded"])
def test_strides_of_every_kind(which, layout):
    given = dict(zip(("query", "keys", "values"), inputs(0, torch.float32, 2, 3, 12, 32)))
    plain = given[which]
    if layout == "heads inside":
        strided = plain.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "every other number":
        strided = plain.repeat_interleave(2, dim=-1)[..., ::2]
    elif layout == "cut out":
        strided = torch.nn.functional.pad(plain, (3, 5, 1, 2), value=torch.nan)[:, :, 1:-2, 3:-5]
    else:
        plain = plain[:, :1].expand_as(plain).contiguous()
        strided = plain[:, :1].expand_as(plain)
    assert torch.equal(strided, plain) and strided.stride() != plain.stride()
    got = attend(**{**given, which: strided}, scale=0.2)
    expected = attend(**{**given, which: plain}, scale=0.2)
    assert torch.equal(got.out, expected.out) and torch.equal(got.lse, expected.lse)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_inputs_are_left_alone(softcap):
    given = inputs(0, torch.float32, 2, 3, 12, 32)
    allowed = mask_of("per query", 0, 3, 12)
    before = [t.clone() for t in (*given, allowed)]
    attend(*given, 0.2, softcap, allowed)
    assert all(torch.equal(a, b) for a, b in zip(before, (*given, allowed)))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_nan_among_the_keys_shows(softcap):
    query, keys, values = inputs(0, torch.float32, 2, 1, 12, 32)
    keys[1, 0, 5, 3] = torch.nan
    out, lse = attend(query, keys, values, 0.2, softcap)
    assert bool(out[1, :2].isnan().any() | lse[1, :2].isnan().any())
    assert not bool(out[0].isnan().any() | out[1, 2:].isnan().any())


def test_folding_a_group_and_back():
    query = torch.arange(2 * 8 * 3 * 5.0).view(2, 8, 3, 5)
    folded = fold_group(query, 2)
    assert folded.shape == (2, 2, 12, 5)
    assert torch.equal(folded[:, 1, 3:6], query[:, 5])
    from scout_hf.fusion import Partial

    back = unfold_group(Partial(folded, folded[..., 0]), query)
    assert torch.equal(back.out, query) and torch.equal(back.lse, query[..., 0])


@pytest.mark.parametrize("shape", [(2, 4, 1, 9), (2, 1, 9), (2, 1, 1, 8), (1, 3, 1, 9), (2, 1, 5, 9)], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_mask_of_another_shape_is_told_the_right_one(shape, softcap):
    query, keys = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8)
    with pytest.raises(UnsupportedInputError, match=r"\(batch, kv_heads, queries, tokens\) = \(2, 2, 1, 9\)"):
        attend(query, keys, keys, 1.0, softcap, torch.ones(shape, dtype=torch.bool))
