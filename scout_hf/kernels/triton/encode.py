"""Encode digests on a GPU: the choice of the kernel."""

from __future__ import annotations

from typing import Any

import torch

from scout_hf.kernels.triton.encode_bounds import encode_bounds
from scout_hf.kernels.triton.encode_parts import encode_parts
from scout_hf.kernels.triton.encode_sign import encode_sign
from scout_hf.kernels.triton.support import next_power_of_2, runs_on

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# Limits of a program: channels of a head, tokens of a block.
MAX_HEAD_DIM, MAX_BLOCK = 256, 256


def encode(digest: Any, keys: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor | None:
    """``digest.encode(keys, padding_mask)`` without a copy of the keys.

    Bounds are bitwise equal to those of torch; signs of sign codes may differ where a rotated value is close to 0.

    Parameters
    ----------
    digest : Digest
        Supported names: ``"minmax"``, ``"minmax-int8"``, ``"minmax-sub"``, ``"sign"``, ``"sign2"``; fitted, if it needs
        that.
    keys : Tensor (batch, kv_heads, blocks, block_size, head_dim)
        The last stride must be 1.
    padding_mask : Tensor (batch, blocks, block_size) of bool, or None
        False for padding; None if there is none.

    Returns
    -------
    Tensor (batch, kv_heads, blocks, code), or None
        None if no kernel supports the digest or the keys.

    Examples
    --------
    >>> from scout_hf.selection import make_digest  # doctest: +SKIP
    >>> keys = torch.randn(1, 2, 4, 32, 64, device="cuda")  # doctest: +SKIP
    >>> encode(make_digest("minmax"), keys, None).shape  # doctest: +SKIP
    torch.Size([1, 2, 4, 128])
    """
    known = runs_on(keys) and keys.dtype in FLOATS and keys.stride(4) == 1 and bool(keys.numel())
    size, dim = keys.shape[3:]
    if not known or dim > MAX_HEAD_DIM or size > MAX_BLOCK:
        return None
    if padding_mask is not None and (padding_mask.device != keys.device or padding_mask.dtype != torch.bool):
        return None
    if digest.name == "minmax":
        return encode_bounds(keys, padding_mask)
    if digest.name == "minmax-int8" and _here(keys, digest.middle, digest.step):
        return encode_bounds(keys, padding_mask, digest.middle, digest.step, digest.bits)
    if digest.name == "minmax-sub" and _here(keys, digest.middle, digest.step):
        sub = min(digest.sub, size)
        fits = sub == next_power_of_2(sub) and size % sub == 0 and dim % 2 == 0 and digest.bits == 4
        return encode_parts(keys, padding_mask, digest.middle, digest.step, sub) if fits else None
    if digest.name in ("sign", "sign2") and _here(keys, digest.mean, digest.divisor, digest.rotation):
        fits = size == next_power_of_2(size) and dim % 8 == 0
        constants = (digest.mean, digest.divisor, digest.rotation)
        return encode_sign(keys, padding_mask, *constants, digest.bits) if fits else None
    return None


def _here(keys: torch.Tensor, *constants: torch.Tensor) -> bool:
    return all(each.device == keys.device and each.dtype == torch.float32 for each in constants)
