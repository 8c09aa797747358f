"""Read keys for digests: in parts of bounded size, and a sample of a long context."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.utils.rnn import pad_sequence

from scout_hf.kernels.cpu.protocols import PagedStore

# Encoding in parts avoids a copy of a whole layer for a long prompt.
PART_TOKENS, SAMPLE_TOKENS = 4096, 8192
FIRST = torch.tensor([0], dtype=torch.int64, device="cpu")
Blocks = tuple[torch.Tensor, torch.Tensor | None]
"""Keys (batch, kv_heads, n, block_size, head_dim) and their padding mask, (batch, n, block_size) of bool or None."""


def in_parts(keys: torch.Tensor, padding_mask: torch.Tensor | None) -> Iterator[Blocks]:
    """Split blocks into parts of at most ``PART_TOKENS`` tokens; views."""
    step = max(1, PART_TOKENS // keys.shape[3])
    for first in range(0, keys.shape[2], step):
        part = slice(first, first + step)
        yield keys[:, :, part], None if padding_mask is None else padding_mask[:, part]


def read_parts(store: PagedStore, first: int, last: int, padding_mask: torch.Tensor | None) -> Iterator[Blocks]:
    """Blocks ``first:last`` of a PagedKV, copied; ``padding_mask`` is (batch, tokens) of bool or None."""
    step = max(1, PART_TOKENS // store.block_size)
    for start in range(first, last, step):
        ids = torch.arange(start, min(last, start + step), dtype=torch.int64, device="cpu")
        yield _read(store, ids.expand(store.batch, -1), padding_mask)


def read_sample(store: PagedStore, last: int, padding_mask: torch.Tensor | None) -> Blocks:
    """A sample of at most ``SAMPLE_TOKENS`` tokens, evenly spaced over each row's real blocks before ``last``."""
    most = max(1, SAMPLE_TOKENS // store.block_size)
    if padding_mask is None:
        every = torch.arange(last, dtype=torch.int64, device="cpu")
        return _read(store, _evenly(every, most).expand(store.batch, -1), None)
    real = padding_mask[:, : last * store.block_size].unflatten(1, (-1, store.block_size)).any(-1).cpu()
    # A row of only padding contributes one block of padding.
    rows = [_evenly(row.nonzero()[:, 0] if row.any() else FIRST, most) for row in real]
    ids = pad_sequence(rows, batch_first=True)
    keys, marks = _read(store, ids, padding_mask)
    held = torch.tensor([len(row) for row in rows], dtype=torch.int64, device="cpu")[:, None]
    held = held > torch.arange(ids.shape[1], dtype=torch.int64, device="cpu")
    return keys, None if marks is None else marks & held[:, :, None].to(marks.device)


def _evenly(numbers: torch.Tensor, most: int) -> torch.Tensor:
    count = min(len(numbers), most)
    return numbers[torch.arange(count, dtype=torch.int64, device="cpu") * (len(numbers) - 1) // max(1, count - 1)]


def _read(store: PagedStore, ids: torch.Tensor, padding_mask: torch.Tensor | None) -> Blocks:
    """Blocks ``ids`` (batch, n) of every row."""
    shape = (store.batch, store.heads, ids.shape[1], store.block_size, store.head_dim)
    keys, values = (torch.empty(shape, dtype=store.dtype, device=store.device) for _ in range(2))
    store.gather(ids[:, None].expand(shape[:3]), keys, values)
    if padding_mask is None:
        return keys, None
    whole = padding_mask[:, : padding_mask.shape[1] // store.block_size * store.block_size].unflatten(
        1, (-1, store.block_size)
    )
    return keys, whole.to(keys.device).gather(1, ids[:, :, None].expand(-1, -1, store.block_size).to(keys.device))
