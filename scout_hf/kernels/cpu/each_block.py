"""Attention over every block separately: one partial per block, with its LSE; any union of blocks can be merged."""

from __future__ import annotations

import time
from collections.abc import Callable
from ctypes import byref
from typing import Any

import torch

from scout_hf.fusion import Partial
from scout_hf.kernels.attend import attend
from scout_hf.kernels.cpu import pages
from scout_hf.kernels.cpu.addresses import address
from scout_hf.kernels.cpu.library import DTYPES, AttendArgs, check
from scout_hf.kernels.cpu.pool import NativePool, quick

CHUNK_TOKENS = 4096
PAUSE_S = 0.0005


def natively(query: torch.Tensor, blocks: Any) -> bool:
    """Whether the native library supports this query and these blocks (a WholeBlocks)."""
    return blocks.library is not None and query.is_cpu and query.dtype in DTYPES


def attend_each_native(
    query: torch.Tensor,
    blocks: Any,
    row: int,
    head: int,
    scale: float,
    softcap: float | None,
    padding_mask: torch.Tensor | None,
    pool: NativePool | None,
) -> Partial:
    """One partial per block, for one KV head of one row, with the native library.

    Parameters
    ----------
    query : Tensor (group, head_dim)
        The query heads of the KV head's GQA group; ``natively`` must hold.
    blocks : WholeBlocks
    row, head : int
    scale, softcap
        As in :func:`scout_hf.kernels.attend.attend`.
    padding_mask : Tensor (blocks, block_size) of bool, contiguous, or None
        False for padding; None if there is none.
    pool : NativePool or None
        Pool to run on (the call blocks until the end); None for the calling thread and torch's OpenMP team.

    Returns
    -------
    Partial
        Output (blocks, group, head_dim) and LSE (blocks, group), float32.
    """
    addresses, query = blocks.addresses(row, head), query.contiguous()
    group, dim = query.shape
    out = torch.empty((len(addresses), group, dim), dtype=torch.float32, device="cpu")
    lse = torch.empty((len(addresses), group), dtype=torch.float32, device="cpu")
    # Describe every block as a row of a batch with one KV head; all rows have the same query.
    store = pages.store_args(1, dim, blocks.block_size, blocks.dtype, blocks.packed)
    store.pages, store.pages_stride, store.batch = address(addresses, torch.int64), 1, len(addresses)
    store.length = blocks.block_size
    args = AttendArgs(
        store=store,
        query=address(query, *DTYPES),
        query_row=0,
        query_head=query.stride(0),
        out=address(out, torch.float32),
        lse=address(lse, torch.float32),
        query_heads=group,
        query_dtype=DTYPES[query.dtype],
        scale=scale,
        softcap=softcap or 0.0,
    )
    if padding_mask is not None:
        args.padding_mask, args.padding_mask_stride = address(padding_mask, torch.bool), padding_mask.stride(0)
    if pool is None:
        check(blocks.library.attend(byref(args), torch.get_num_threads()), "blocks to attend")
    else:
        # Kept alive: an interrupt may end this call while the job still runs.
        keep = (query, blocks, addresses, padding_mask, out, lse)
        pool.submit(quick(blocks.library.handle, "scout_submit_attend"), args, keep=keep).wait()
        check(args.status, "blocks to attend")
    return Partial(out, lse)


def attend_each(
    query: torch.Tensor,
    blocks: Any,
    row: int,
    head: int,
    scale: float,
    softcap: float | None,
    padding_mask: torch.Tensor | None,
    busy: Callable[[], bool] | None = None,
) -> Partial:
    """As :func:`attend_each_native`, with torch on the device of the blocks, a few thousand tokens at a time.

    ``busy`` returns whether more urgent work is running; each chunk waits until it returns False. The result has the
    dtype of the query, float32 at least.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query, chunk, parts = query.to(wide), max(1, CHUNK_TOKENS // blocks.block_size), []
    for first in range(0, blocks.blocks, chunk):
        while busy is not None and busy():
            time.sleep(PAUSE_S)
        last = min(first + chunk, blocks.blocks)
        keys, values = (part.to(wide).unsqueeze(1) for part in blocks.read(row, head, first, last))
        allowed = None if padding_mask is None else padding_mask[first:last, None, None]
        each = query[None, :, None].expand(last - first, -1, -1, -1).contiguous()
        part = attend(each, keys, values, scale, softcap, allowed)
        parts.append((part.out.squeeze(2), part.lse.squeeze(2).to(wide)))
    if not parts:
        return Partial(query.new_empty((0, *query.shape)), query.new_empty((0, len(query))))
    return Partial(*(torch.cat(some) for some in zip(*parts)))
