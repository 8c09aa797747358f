"""Norms, rotary embedding and gates in one launch: at most twice as far from float64 as the model's own operations."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from torch import nn  # noqa: E402
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb  # noqa: E402

from scout_hf.kernels.triton import rms_norm, rotate, silu_product  # noqa: E402
from tests.triton.grid import ON_GPU, draw  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy of the interpreter, at infinity

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(got, stock, exact):
    """At most twice as far from the exact result as the model's own operations."""
    assert got.dtype == stock.dtype and got.shape == stock.shape
    error, theirs = ((part.double() - exact).abs() for part in (got, stock))
    assert error.norm() <= 2 * theirs.norm() and error.max() <= 2 * theirs.max()


def norm_of(kind, dim, dtype, seed=0):
    norm = kind(dim, eps=1e-3)
    norm.weight.data = draw(seed, dim, dtype=dtype)
    return norm


def exact_norm(norm, x):
    x, weight = x.double(), norm.weight.data.double() + (isinstance(norm, GemmaRMSNorm))
    return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 96, 128, 1000, 4096, 5120])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
@torch.no_grad()
def test_norm(kind, dim, dtype):
    norm, x = norm_of(kind, dim, dtype), draw(dim, 3, 2, dim, dtype=dtype) * 3
    x[0, 0] *= 1e-3  # a row where eps counts
    got = rms_norm(x, norm.weight, 1e-3, kind is GemmaRMSNorm)
    check(got, norm(x), exact_norm(norm, x))


@torch.no_grad()
def test_norm_of_heads_within_a_projection():
    """Rows with gaps between them, and heads before or behind the token: each result in its input's order."""
    norm = norm_of(LlamaRMSNorm, 64, torch.bfloat16)
    projected = draw(1, 2, 1, 5, 2 * 64, dtype=torch.bfloat16)
    half = projected[..., :64]
    for x in (half[:, 0], half.transpose(1, 2)[:, :, 0], half.transpose(1, 2)[:, ::2, 0]):
        got = rms_norm(x, norm.weight, 1e-3)
        check(got, norm(x), exact_norm(norm, x))
    whole = draw(2, 2, 3, 5, 64, dtype=torch.bfloat16)[:, 1].transpose(0, 1)
    assert torch.equal(rms_norm(whole, norm.weight, 1e-3), rms_norm(whole.contiguous(), norm.weight, 1e-3))


@torch.no_grad()
def test_norm_of_what_is_no_number():
    norm, x = norm_of(LlamaRMSNorm, 32, torch.bfloat16), draw(3, 4, 1, 32, dtype=torch.bfloat16)
    x[0, 0, 3], x[1, 0, 5], x[2] = torch.nan, torch.inf, 0
    got, stock = rms_norm(x, norm.weight, 1e-3), norm(x)
    assert torch.equal(got.isnan(), stock.isnan()) and bool(got[0].isnan().all())
    assert bool((got[2] == 0).all()) and not bool(got[3].isnan().any())


def angles(rows, dim, dtype, seed=0):
    """Not the same in both halves, as some families have them."""
    return draw(seed, rows, 1, dim).cos().to(dtype), draw(seed + 1, rows, 1, dim).sin().to(dtype)


def exact_rotation(x, cos, sin):
    x, cos, sin = x.double(), cos.double()[:, None], sin.double()[:, None]
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, dim", [(8, 2, 64), (5, 5, 80), (7, 1, 96), (4, 2, 128), (1, 1, 8)])
@pytest.mark.parametrize("rows", [1, 3])
def test_rotation(rows, heads, kv_heads, dim, dtype):
    query, keys = (draw(seed, 3, 1, count, dim, dtype=dtype) for seed, count in enumerate((heads, kv_heads)))
    query, keys, (cos, sin) = query.transpose(1, 2), keys.transpose(1, 2), angles(rows, dim, dtype)
    before = query.clone(), keys.clone()
    stock, got = apply_rotary_pos_emb(query, keys, cos, sin), rotate(query, keys, cos, sin)
    for ours, theirs, x in zip(got, stock, (query, keys)):
        check(ours, theirs, exact_rotation(x, cos, sin))
        assert ours.is_contiguous()
    assert torch.equal(query, before[0]) and torch.equal(keys, before[1])
    if not ON_GPU and dtype != torch.float32:
        assert all(torch.equal(*pair) for pair in zip(got, stock))


def test_rotation_of_parts_of_one_projection_and_of_a_query_alone():
    projected, (cos, sin) = draw(0, 2, 1, 9, 64), angles(2, 64, torch.float32)
    query, keys, _ = projected.transpose(1, 2).split([6, 2, 1], 1)
    both, apart = rotate(query, keys, cos, sin), rotate(query.contiguous(), keys.contiguous(), cos, sin)
    assert all(torch.equal(*pair) for pair in zip(both, apart))
    alone, none = rotate(query, query[:, :0], cos, sin)
    assert torch.equal(alone, both[0]) and none.shape == (2, 0, 1, 64)
    wide = torch.stack((cos, cos), -1).flatten(-2)[..., ::2], torch.cat((sin, sin), 1)[:, :1]
    assert torch.equal(rotate(query, keys, wide[0].contiguous(), wide[1])[1], both[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 1, 1024), (2, 1, 2500)])
def test_gate(shape, dtype):
    gate, up = draw(0, *shape, dtype=dtype) * 4, draw(1, *shape, dtype=dtype)
    gate.view(-1)[:3] = torch.tensor([-200.0, 200.0, 0.0])
    exact = gate.double() * gate.double().sigmoid() * up.double()
    got, stock = silu_product(gate, up), nn.functional.silu(gate) * up
    check(got, stock, exact)
