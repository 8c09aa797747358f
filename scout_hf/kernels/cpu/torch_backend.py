"""Attention over chosen host blocks with torch alone: gather a chunk, attend, merge. Works wherever torch does."""

from __future__ import annotations

import threading

import torch

from scout_hf.fusion import Partial, empty_like, fuse
from scout_hf.kernels.attend import attend
from scout_hf.kernels.cpu.backend import CpuBackend

CHUNK_TOKENS = 1024


class TorchBackend(CpuBackend):
    """Chunked gather into a reused buffer, then torch's flash kernel, whose LSE merges the chunks.

    One object may be used from several threads; each has its own buffers.
    """

    name = "torch"

    def __init__(self):
        self._scratch = _Scratch()

    def __reduce__(self):
        return TorchBackend, ()

    def attend_blocks(
        self,
        query: torch.Tensor,
        store,
        blocks: torch.Tensor,
        unfilled: int,
        scale: float,
        softcap: float | None = None,
        allowed: torch.Tensor | None = None,
    ) -> Partial:
        count, parts = blocks.shape[2], []
        chunks = max(1, round(count * store.block_size / CHUNK_TOKENS))
        chunk = max(1, -(-count // chunks))
        for first in range(0, count, chunk):
            ids = blocks[:, :, first : first + chunk]
            keys, values = self._scratch.pair(ids.shape, store)
            store.gather(ids, keys, values)
            last = first + chunk >= count
            tokens = ids.shape[2] * store.block_size - (unfilled if last else 0)
            mask = None if allowed is None else allowed[:, :, first : first + chunk].flatten(2)[:, :, None, :tokens]
            keys, values = keys.flatten(2, 3)[:, :, :tokens], values.flatten(2, 3)[:, :, :tokens]
            parts.append(attend(query, keys, values, scale, softcap, mask))
        return fuse(parts) if parts else empty_like(query)


class _Scratch(threading.local):
    """Buffers of one thread that grow to the largest size asked for and are then reused."""

    buffer: torch.Tensor | None = None

    def pair(self, blocks: torch.Size, store) -> tuple[torch.Tensor, torch.Tensor]:
        """Two undefined tensors (*blocks, block_size, head_dim) in the dtype of the store."""
        shape = (2, *blocks, store.block_size, store.head_dim)
        numbers = torch.Size(shape).numel()
        pool = store.table.pool
        fits = self.buffer is not None and self.buffer.dtype == pool.dtype and self.buffer.device == pool.device
        if not fits or self.buffer.numel() < numbers:
            self.buffer = torch.empty(numbers, dtype=pool.dtype, device=pool.device)
        keys, values = self.buffer[:numbers].view(shape)
        return keys, values
