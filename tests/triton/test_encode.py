"""Kernels that make digests: bounds are those of the torch references, bit for bit, and so are signs that are clear."""

from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("triton")

from scout_hf.kernels.triton.encode import encode  # noqa: E402
from scout_hf.selection import make_digest  # noqa: E402
from scout_hf.selection.digest import repeat_real  # noqa: E402
from scout_hf.selection.sign import LEVEL_STEP, scale_to_byte  # noqa: E402
from tests.triton.grid import DEVICE  # noqa: E402
from tests.triton.keys import DIMS, DTYPES, SIZES, draw, fitted, some_padding  # noqa: E402

BOUNDS, NAMES = ("minmax", "minmax-int8", "minmax-sub"), ("minmax", "minmax-int8", "minmax-sub", "sign", "sign2")
SIGNS = ("sign", "sign2")
# Of a token's scale: rotated values nearer to 0 may get either sign.
UNCLEAR = 1e-4


def ready(name, keys, padding_mask=None, query=None):
    return make_digest(name) if name == "minmax" else fitted(name, keys, query, padding_mask)


def planes_of(codes, size, dim, bits):
    """The signs of every plane, (batch, heads, blocks, size, bits, dim) of bool."""
    rows = codes[..., : size * bits * dim // 8].unflatten(3, (bits, dim // 8, size))
    return torch.stack([rows >> bit & 1 for bit in range(8)], 5).bool().flatten(4, 5).permute(0, 1, 2, 5, 3, 4)


def check_signs(digest, keys, padding_mask, codes, expected):
    """That codes differ from the reference's only where a value is nearly a limit, or a scale between two bytes."""
    size, dim = keys.shape[3:]
    assert codes.dtype == torch.uint8 and codes.shape == expected.shape
    keys = keys if padding_mask is None else repeat_real(keys, padding_mask)
    centred = (keys.double() - digest.mean.double()[:, :, None, None]) / digest.divisor.double()[:, :, None, None]
    turned = centred @ digest.rotation.double()
    planes, others = (planes_of(part, size, dim, digest.bits) for part in (codes, expected))
    step = LEVEL_STEP * turned.square().mean(-1, keepdim=True).sqrt()
    limits = [0.0] if digest.bits == 1 else [-1.0, 0.0, 1.0]
    near = torch.stack([(turned - limit * step).abs() for limit in limits]).amin(0)
    assert bool((near <= UNCLEAR * step)[(planes != others).any(4)].all())
    levels = sum((2.0 * planes[..., plane, :] - 1) * 0.5**plane for plane in range(digest.bits))
    scale = turned.square().sum(-1) / (turned * levels.double()).sum(-1).clamp(min=1e-30)
    low, high = (scale_to_byte((scale * (1 + side * UNCLEAR)).float()) for side in (-1, 1))
    rows = size * digest.bits * dim // 8
    assert bool(((codes[..., rows:] >= low) & (codes[..., rows:] <= high)).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim, size, blocks", [*zip((*DIMS, 128), SIZES, (1, 7, 5, 3, 2, 1)), (128, 8, 3), (24, 32, 2)])
@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.thin(3)
def test_bounds(name, dim, size, blocks, dtype):
    _, keys = draw(dim + size, 2, 1, 1, blocks, size, dim, dtype)
    for padding_mask in (None, some_padding(2, blocks, size)):
        digest = ready(name, keys, padding_mask)
        codes, expected = encode(digest, keys, padding_mask), digest.encode(keys, padding_mask)
        assert codes.dtype == expected.dtype and torch.equal(codes, expected)


@pytest.mark.parametrize("size", [1, 6, 13, 40])
def test_blocks_of_any_size(size):
    _, keys = draw(size, 2, 1, 1, 3, size, 64)
    for name in ("minmax", "minmax-int8") + (("minmax-sub",) if size in (1, 40) else ()):
        for padding_mask in (None, some_padding(2, 3, size)):
            digest = ready(name, keys, padding_mask)
            assert torch.equal(encode(digest, keys, padding_mask), digest.encode(keys, padding_mask))


def test_bounds_on_the_grid_itself():
    """A bound that is a whole number of steps stays that number: what is rounded outwards must not be off by a hair."""
    digest = make_digest("minmax-int8")
    digest.middle = torch.full((1, 1, 1, 8), 0.3, device=DEVICE)
    digest.step = torch.full((1, 1, 1, 8), 0.1, device=DEVICE)
    whole = torch.arange(-130, 131, 2, device=DEVICE).float()
    keys = (digest.middle + whole[:, None, None] * digest.step).view(1, 1, 131, 1, 8)
    assert torch.equal(encode(digest, keys, None), digest.encode(keys, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim, size, blocks", [*zip((*DIMS, 128), SIZES, (1, 11, 5, 3, 1, 2))])
@pytest.mark.parametrize("name", SIGNS)
@pytest.mark.thin(3)
def test_signs(name, dim, size, blocks, dtype):
    query, keys = draw(dim + size, 2, 1, 2, blocks, size, dim, dtype)
    for padding_mask in (None, some_padding(2, blocks, size)):
        digest = fitted(name, keys, query, padding_mask)
        check_signs(digest, keys, padding_mask, encode(digest, keys, padding_mask), digest.encode(keys, padding_mask))


@pytest.mark.parametrize("name", SIGNS)
@pytest.mark.parametrize("dim, size", [(8, 16), (24, 2), (40, 1)])
def test_signs_of_small_heads_and_blocks(name, dim, size):
    _, keys = draw(dim, 2, 1, 1, 67, size, dim)
    digest = fitted(name, keys)
    check_signs(digest, keys, None, encode(digest, keys, None), digest.encode(keys, None))


@pytest.mark.parametrize("name", SIGNS)
def test_signs_under_loud_channels(name):
    """Channels a thousand times as large as others, and tokens of very different size."""
    _, keys = draw(0, 1, 2, 1, 5, 16, 128)
    keys[..., ::9] *= 1000
    keys *= torch.logspace(-3, 3, 16, device=DEVICE)[:, None]
    digest = fitted(name, keys)
    check_signs(digest, keys, None, encode(digest, keys, None), digest.encode(keys, None))


@pytest.mark.parametrize("name", NAMES)
def test_views(name):
    """Keys with any strides but the last, and marks of all blocks where some are coded."""
    query, keys = draw(1, 2, 2, 2, 3, 8, 64, torch.bfloat16)
    padding_mask = some_padding(2, 3, 8)
    digest = ready(name, keys, padding_mask, query)
    expected = encode(digest, keys, padding_mask)
    token_first = keys.flatten(2, 3).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, (3, 8))
    wide = torch.full((3, 2, 7, 9, 80), torch.nan, dtype=keys.dtype, device=DEVICE)[1:, :, 1::2, 1:, :64].copy_(keys)
    marks = torch.zeros(2, 8, 3, dtype=torch.bool, device=DEVICE).transpose(1, 2).copy_(padding_mask)
    for view in (token_first, wide):
        assert not view.is_contiguous()
        for some in (padding_mask, marks):
            assert torch.equal(encode(digest, view, some), expected)
    assert torch.equal(encode(digest, wide[:, :, 1:], marks[:, 1:]), expected[:, :, 1:])
    alike = padding_mask[:1].expand(2, -1, -1)
    assert torch.equal(encode(digest, keys, alike), encode(digest, keys, alike.contiguous()))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("rubbish", [1e30, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thin(2)
def test_padding_has_no_say(name, rubbish):
    query, keys = draw(2, 2, 1, 2, 7, 16, 64)
    padding_mask = some_padding(2, 7, 16)
    digest = ready(name, keys, padding_mask, query)
    clean = encode(digest, keys, padding_mask)
    dirty = keys.masked_fill(~padding_mask[:, None, :, :, None], rubbish)
    codes, some = encode(digest, dirty, padding_mask), padding_mask.any(2)[:, None].expand(-1, 1, -1)
    assert torch.equal(codes[some], clean[some]) and not bool(some.all())
    if name == "minmax":
        assert bool((codes[~some] == 0).all())
    if name not in SIGNS:
        assert torch.equal(codes, digest.encode(dirty, padding_mask))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", BOUNDS)
def test_keys_that_are_no_numbers(name):
    """Real tokens with them give what they give in the reference."""
    _, keys = draw(3, 1, 2, 1, 4, 16, 64)
    digest = ready(name, keys)
    keys[0, 0, 0, 3, 5], keys[0, 0, 1, 4, 6], keys[0, 1, 2, 0, 7] = torch.nan, torch.inf, -torch.inf
    keys[0, 1, 3, :, 8], keys[0, 1, 1, :, 9] = torch.nan, torch.inf
    for padding_mask in (None, torch.ones(1, 4, 16, dtype=torch.bool, device=DEVICE)):
        codes, expected = encode(digest, keys, padding_mask), digest.encode(keys, padding_mask)
        assert torch.equal(codes.nan_to_num(1e9), expected.nan_to_num(1e9))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", SIGNS)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_token_that_is_no_number_spoils_no_other(name, wrong):
    _, keys = draw(3, 1, 1, 1, 3, 16, 64)
    digest = fitted(name, keys)
    clean = encode(digest, keys, None)
    keys[0, 0, 1, 4, 6] = wrong
    codes = encode(digest, keys, None)
    scale = 16 * 8 * digest.bits + 4
    assert codes[0, 0, 1, scale] == 255 == digest.encode(keys, None)[0, 0, 1, scale]
    assert set((codes != clean).nonzero()[:, 3].remainder(16).tolist()) == {4}


@pytest.mark.parametrize("name", NAMES)
def test_keys_behind_2_31_elements(name):
    _, keys = draw(4, 1, 3, 1, 3, 8, 64, torch.float16)
    digest = ready(name, keys)
    buffer = torch.empty(2**31 + 2**16, dtype=torch.float16, device=DEVICE)
    for strides in ((0, 2**30, 2**10), (0, 2**12, 2**30)):
        far = buffer.as_strided(keys.shape, (*strides, 64, 1))
        far.copy_(keys)
        assert torch.equal(encode(digest, far, None), encode(digest, keys, None))


def test_what_no_kernel_knows_is_left_to_the_caller():
    _, keys = draw(5, 1, 2, 1, 2, 8, 64)
    minmax, sub, sign = make_digest("minmax"), fitted("minmax-sub", keys), fitted("sign", keys)
    assert encode(types.SimpleNamespace(name="mean"), keys, None) is None
    assert torch.equal(encode(types.SimpleNamespace(name="minmax"), keys, None), minmax.encode(keys, None))
    assert encode(minmax, keys.double(), None) is None and encode(minmax, keys[:, :, :0], None) is None
    assert encode(minmax, keys.transpose(3, 4), None) is None
    assert encode(minmax, keys, torch.ones(1, 2, 8, device=DEVICE)) is None
    assert encode(sign, keys[:, :, :, :6], None) is None
    assert encode(sub, keys[:, :, :, :6], None) is None
    assert encode(minmax, torch.empty(1, 1, 1, 2, 512, device=DEVICE), None) is None
