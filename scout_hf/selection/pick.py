"""The blocks that a decode step attends to, per row and KV head, within a budget."""

from __future__ import annotations

from typing import NamedTuple

import torch

from scout_hf.kernels.cpu import BlockLists


class Pick(NamedTuple):
    """Chosen blocks.

    ids : Tensor (batch, kv_heads, n) of int64
        Block numbers, best first; distinct within a row and head.
    usable : Tensor (batch, kv_heads, n) of bool, or None
        False where a row has fewer blocks to offer than others; None when every entry counts.
    """

    ids: torch.Tensor
    usable: torch.Tensor | None

    def usable_or_all(self) -> torch.Tensor:
        """``usable``, as a tensor in either case."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.usable is None else self.usable


def everything(batch: int, heads: int, blocks: int, exists: torch.Tensor | None, device) -> Pick:
    """All blocks, for every row and head, those that are padding last; ``exists`` as in :func:`choose`."""
    if exists is None:
        return Pick(torch.arange(blocks, dtype=torch.int64, device=device).expand(batch, heads, blocks), None)
    order = exists.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    usable = exists.gather(1, order)
    return Pick(*(part[:, None].expand(batch, heads, blocks) for part in (order, usable)))


def choose(scores: torch.Tensor, count: int | torch.Tensor, sinks: int, exists: torch.Tensor | None) -> Pick:
    """The best-scored blocks, sinks always among them.

    Parameters
    ----------
    scores : Tensor (batch, kv_heads, blocks) of float32
        Larger is better; overwritten.
    count : int or Tensor (batch,)
        Blocks to choose, for all rows or for each.
    sinks : int
        Leading real blocks of a row that are always chosen, as far as ``count`` goes.
    exists : Tensor (batch, blocks) of bool, or None
        Blocks with at least one token that is no padding; None when all have.
    """
    blocks = scores.shape[2]
    if exists is None:
        scores[:, :, : min(sinks, count) if isinstance(count, int) else sinks] = torch.inf
    else:
        scores.masked_fill_(~exists[:, None], -torch.inf)
        most = min(sinks, count) if isinstance(count, int) else count.clamp(max=sinks)[:, None].to(exists.device)
        leading = exists & (exists.cumsum(1) <= most)
        scores.masked_fill_(leading[:, None], torch.inf)
    most = min(blocks, count if isinstance(count, int) else int(count.max()))
    best = scores.topk(most, dim=2)
    usable = None
    if exists is not None:
        usable = best.values > -torch.inf
    if not isinstance(count, int):
        within = torch.arange(most, dtype=torch.int64, device=scores.device) < count.to(scores.device)[:, None, None]
        usable = within.expand_as(best.indices) if usable is None else usable & within
    return Pick(best.indices, usable)


def pack_lists(ids: torch.Tensor, usable: torch.Tensor) -> BlockLists:
    """The usable entries of every list, in their order, packed to the front; on the CPU.

    ``ids`` is (batch, kv_heads, n), ``usable`` bool of the same shape.
    """
    ids, usable = ids.cpu(), usable.cpu()
    counts = usable.sum(2)
    longest = int(counts.max()) if counts.numel() else 0
    order = usable.to(torch.int8).argsort(dim=2, descending=True, stable=True)[:, :, :longest]
    return BlockLists(ids.gather(2, order).to(torch.int32), counts.to(torch.int32))
