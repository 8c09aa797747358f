"""Append to pages and gather from them with the native library; stores fall back to torch where it cannot."""

from __future__ import annotations

from ctypes import byref

import torch

from scout_hf.kernels.cpu.addresses import address
from scout_hf.kernels.cpu.library import (
    DTYPES,
    INT8,
    PLAIN,
    AppendArgs,
    GatherArgs,
    Library,
    MinMaxArgs,
    StoreArgs,
    check,
    load_library,
)

MAX_HEAD_DIM, MAX_BLOCK = 576, 256


def library_for(dtype: torch.dtype, head_dim: int, block_size: int, device: torch.device) -> Library | None:
    """The native library, if it is installed and supports this dtype, these sizes and this device; else None."""
    known = device.type == "cpu" and dtype in DTYPES and head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0
    return load_library() if known and block_size <= MAX_BLOCK and block_size % 4 == 0 else None


def store_args(heads: int, head_dim: int, block_size: int, dtype: torch.dtype, packed: bool) -> StoreArgs:
    """A ``scout_store`` with sizes and types, without pages; ``packed`` for int8."""
    plain = DTYPES[dtype]
    return StoreArgs(
        kv_heads=heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=INT8 if packed else plain,
        plain_dtype=plain,
    )


def append(library: Library, store: StoreArgs, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write new tokens, (batch, kv_heads, tokens, head_dim) each, behind the first ``store.length`` tokens."""
    if keys.stride(3) != 1 or values.stride(3) != 1:
        keys, values = keys.contiguous(), values.contiguous()
    args = AppendArgs(
        store=store,
        keys=address(keys, PLAIN[store.plain_dtype], strided=True),
        values=address(values, PLAIN[store.plain_dtype], strided=True),
        key_strides=keys.stride()[:3],
        value_strides=values.stride()[:3],
        tokens=keys.shape[2],
    )
    check(library.append(byref(args), torch.get_num_threads()), "new tokens")


def gather(library: Library, store: StoreArgs, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Copy blocks, (batch, kv_heads, n) of int64, to contiguous tensors (batch, kv_heads, n, block_size, head_dim)."""
    blocks = blocks.contiguous()
    args = GatherArgs(
        store=store,
        blocks=address(blocks, torch.int64),
        count=blocks.shape[2],
        keys=address(keys, PLAIN[store.plain_dtype]),
        values=address(values, PLAIN[store.plain_dtype]),
    )
    check(library.gather(byref(args), torch.get_num_threads()), "blocks to gather")


def minmax(
    library: Library, store: StoreArgs, first: int, last: int, padding_mask: torch.Tensor | None, codes: torch.Tensor
) -> None:
    """Channel-wise maximum and minimum of the keys of whole blocks ``first:last``, computed from the pages.

    ``codes`` is (batch, kv_heads, blocks, 2 * head_dim) in the dtype of the keys, written at ``first:last``;
    ``padding_mask`` is (batch, tokens) of bool, False for padding, or None.
    """
    args = MinMaxArgs(
        store=store,
        padding_mask=None if padding_mask is None else address(padding_mask, torch.bool, strided=True),
        padding_mask_stride=0 if padding_mask is None else padding_mask.stride(0),
        codes=address(codes, PLAIN[store.plain_dtype], strided=True),
        codes_row=codes.stride(0),
        codes_head=codes.stride(1),
        first=first,
        last=last,
    )
    check(library.minmax(byref(args), torch.get_num_threads()), "blocks to digest")
