"""The torch CPU backend: gather a chunk of blocks, attend, merge."""

from __future__ import annotations

import threading

import torch

from scout_hf.fusion import empty_like, fuse
from scout_hf.kernels.attend import attend
from scout_hf.kernels.cpu.backend import Attended, BlockLists, CpuBackend
from scout_hf.kernels.cpu.protocols import PagedStore

CHUNK_TOKENS = 1024


class TorchBackend(CpuBackend):
    """Chunked gather into a reused buffer, then torch's flash kernel; chunks are merged by their LSE.

    Thread-safe: each thread has its own buffers.
    """

    name = "torch"

    def __init__(self, threads: int | None = None):
        super().__init__(threads)
        self._scratch = _Scratch()

    def attend_blocks(
        self,
        query: torch.Tensor,
        store: PagedStore,
        lists: BlockLists | None,
        scale: float,
        softcap: float | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> Attended:
        if lists is None:
            lists = BlockLists(_numbers(store.blocks).expand(store.batch, store.heads, -1), None)
        ids, parts, tokens = _used(lists), [], 0
        count, size = ids.shape[2], store.block_size
        # Full lists that all end with the last block (if it is partly filled) need no mask: cut off the unfilled end.
        unfilled = store.blocks * size - store.length
        at_end = ids[:, :, -1:] == store.blocks - 1
        plain = lists.counts is None and padding_mask is None and bool(at_end.all() if unfilled else True)
        if not plain:
            padding_mask = None if padding_mask is None else padding_mask.to(ids.device)
        chunks = max(1, round(count * size / CHUNK_TOKENS))
        chunk = max(1, -(-count // chunks))
        for first in range(0, count, chunk):
            some = ids[:, :, first : first + chunk]
            keys, values = self._scratch.pair(some.shape, store)
            store.gather(some, keys, values)
            if unfilled and not plain:
                # Masking is not enough: 0 * NaN is NaN.
                rows, heads, entries = (some == store.blocks - 1).nonzero(as_tuple=True)
                keys[rows, heads, entries, -unfilled:] = values[rows, heads, entries, -unfilled:] = 0
            keys, values, allowed = keys.flatten(2, 3), values.flatten(2, 3), None
            if plain and first + chunk >= count and unfilled:
                keys, values = keys[:, :, :-unfilled], values[:, :, :-unfilled]
            elif not plain:
                allowed = _allowed(some, first, lists.counts, store, padding_mask)
            tokens += keys.shape[:3].numel() if allowed is None else int(allowed.sum())
            if allowed is not None:
                allowed = allowed.unsqueeze(2).to(query.device)
            parts.append(attend(query, keys, values, scale, softcap, allowed))
        return Attended(fuse(parts) if parts else empty_like(query), tokens)


def _used(lists: BlockLists) -> torch.Tensor:
    """The lists as int64, with unused (undefined) entries set to block 0."""
    ids = lists.ids.long()
    if lists.counts is None:
        return ids
    return ids.masked_fill(_numbers(ids.shape[2]) >= lists.counts.unsqueeze(-1), 0)


def _allowed(
    ids: torch.Tensor, first: int, counts: torch.Tensor | None, store: PagedStore, padding_mask: torch.Tensor | None
) -> torch.Tensor:
    """The mask of attended tokens of blocks ``ids``, which are the list entries from ``first`` on."""
    places = ids.unsqueeze(-1) * store.block_size + _numbers(store.block_size)
    allowed = places < store.length
    if counts is not None:
        allowed &= ((first + _numbers(ids.shape[2])) < counts.unsqueeze(-1)).unsqueeze(-1)
    if padding_mask is not None:
        rows = _numbers(len(ids))[:, None, None, None]
        allowed &= padding_mask[rows, places.clamp(max=padding_mask.shape[1] - 1)]
    return allowed.flatten(2)


def _numbers(count: int) -> torch.Tensor:
    """0 to ``count - 1``, on the CPU."""
    return torch.arange(count, dtype=torch.int64, device="cpu")


class _Scratch(threading.local):
    """Buffers of one thread that grow to the largest size asked for and are then reused."""

    buffer: torch.Tensor | None = None

    def pair(self, blocks: torch.Size, store: PagedStore) -> tuple[torch.Tensor, torch.Tensor]:
        """Two undefined tensors (*blocks, block_size, head_dim) in the dtype of the store."""
        shape = (2, *blocks, store.block_size, store.head_dim)
        numbers = torch.Size(shape).numel()
        buffer = self.buffer
        fits = buffer is not None and buffer.dtype == store.dtype and buffer.device == store.device
        if buffer is None or not fits or buffer.numel() < numbers:
            self.buffer = buffer = torch.empty(numbers, dtype=store.dtype, device=store.device)
        keys, values = buffer[:numbers].view(shape)
        return keys, values
