"""Replace padding by the first real token of its block, for codes that cannot represent padding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def first_valid(padding_mask, mask_t, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """The first real token of a block, or the block size if there is none; ``PADDED`` is its next power of two."""
    token = tl.arange(0, PADDED)
    marks = tl.load(padding_mask + token * mask_t, mask=token < SIZE, other=0)
    return tl.min(tl.where(marks != 0, token, SIZE), 0)


@triton.jit
def valid_or_first(padding_mask, mask_t, token, first, SIZE: tl.constexpr):
    """Token indices (n,) of a block, with padding replaced by the first real token; 0 if all is padding."""
    marks = tl.load(padding_mask + token * mask_t)
    return tl.where(marks != 0, token, tl.where(first < SIZE, first, 0))


def as_bytes(padding_mask: torch.Tensor | None) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """The padding mask (batch, blocks, block_size) as kernels read it, and its strides."""
    return (None, (0, 0, 0)) if padding_mask is None else (padding_mask.view(torch.uint8), padding_mask.stride())
