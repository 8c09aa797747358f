"""Passes of several new tokens over cached ones: exact attention over the past, and of the new ones over each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scout_hf.fusion import Partial, fuse
from scout_hf.kernels.attend import attend
from scout_hf.step import Step

if TYPE_CHECKING:
    from scout_hf.kernels.cpu.protocols import PagedStore
    from scout_hf.methods.base import Method

PIECE = 256
"""New tokens whose attention to each other is left to torch, where the pages serve all others."""

AT_ONCE = 2048
"""Queries per read of the past. More would need more memory for parts of results."""


def pages_of_all(method: Method, step: Step, query: torch.Tensor) -> PagedStore | None:
    """The pages of all tokens, if attention over them is faster than torch's for so many new tokens; else None."""
    if query.shape[2] <= 2 * PIECE or step.allowed is not None:
        return None
    pages = method.past_pages(step)
    if pages is None or pages.length != method.length or not step.backend.gains_by_many(query, pages):
        return None
    return pages


def attend_over_pages(
    method: Method, step: Step, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, pages: PagedStore
) -> Partial:
    """Attention of many new tokens to all before them and to each other, over pages that hold all of them."""
    queries = query.shape[2]
    before = method.length - queries
    mask = None if step.mask is None else step.padding(pages.device).contiguous()
    whole = Partial(
        torch.empty(query.shape, dtype=torch.float32, device=query.device),
        torch.empty(query.shape[:3], dtype=torch.float32, device=query.device),
    )

    def attended(first: int, last: int, begin: int, end: int) -> Partial:
        part = step.backend.attend_past(query[:, :, first:last], pages, end, *method.scoring, mask, begin)
        assert part is not None, "gains_by_many() said that it is served"
        return part

    for first in range(0, queries, AT_ONCE):
        last = min(first + AT_ONCE, queries)
        # All of these queries see the blocks that were whole before the first one.
        seen = (before + first) // pages.block_size * pages.block_size
        shared = attended(first, last, 0, seen) if seen else None
        for start in range(first, last, PIECE):
            stop = min(start + PIECE, last)
            new = slice(start, stop)
            parts = [attend_new(method, step, query[:, :, new], keys[:, :, new], values[:, :, new], before + start)]
            if before + start > seen:
                parts.append(attended(start, stop, seen, before + start))
            if shared is not None:
                parts.append(Partial(*(part[:, :, start - first : stop - first] for part in shared)))
            for into, part in zip(whole, fuse(parts)):
                into[:, :, new] = part
    return whole


def attend_past(method: Method, step: Step, query: torch.Tensor, past: int) -> list[Partial]:
    """Attention over the first ``past`` tokens, in parts: in place where the backend can, else chunk by chunk."""
    if past and step.allowed is None and (served := _in_place(method, step, query, past)) is not None:
        return served
    parts = []
    for start, keys, values in method.past_chunks(step, past):
        stop = start + keys.shape[2]
        allowed = _padding(step, query, start, stop) if step.allowed is None else step.allowed[..., start:stop]
        parts.append(attend(query, keys, values, *method.scoring, allowed))
    return parts


def attend_new(
    method: Method, step: Step, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, past: int
) -> Partial:
    """Attention over each other of new tokens that stand behind ``past`` ones."""
    queries = query.shape[2]
    if step.allowed is not None:
        return attend(query, keys, values, *method.scoring, step.allowed[..., past:])
    new = _padding(step, query, past, past + queries)
    if new is None or bool(new.all()):
        return attend(query, keys, values, *method.scoring, causal=True)
    order = torch.arange(queries, dtype=torch.int64, device=query.device)
    return attend(query, keys, values, *method.scoring, new & (order[:, None] >= order[None, :]))


def _in_place(method: Method, step: Step, query: torch.Tensor, past: int) -> list[Partial] | None:
    """Attention over the pages without a copy, then over the past that is not in them; None if that is not possible."""
    pages = method.past_pages(step)
    if pages is None or not pages.length:
        return None
    here = min(past, pages.length)
    mask = None if step.mask is None else step.padding(pages.device)
    part = step.backend.attend_past(query, pages, here, *method.scoring, mask)
    if part is None:
        return None
    if here == past:
        return [part]
    rest = attend(query, *method.kv.read(here, past), *method.scoring, _padding(step, query, here, past))
    return [part, rest]


def _padding(step: Step, query: torch.Tensor, start: int, stop: int | None = None) -> torch.Tensor | None:
    """The padding mask of tokens ``start:stop``, (batch, 1, 1, tokens); None without padding."""
    return None if step.mask is None else step.padding(query.device)[:, None, None, start:stop]
