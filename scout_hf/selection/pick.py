"""The blocks that a decode step attends to, per row and KV head, within a budget."""

from __future__ import annotations

from typing import NamedTuple

import torch

from scout_hf.kernels.cpu import BlockLists


class Pick(NamedTuple):
    """Chosen blocks.

    ids : Tensor (batch, kv_heads, n) of int64
        Block numbers, best first; distinct within a row and head.
    valid : Tensor (batch, kv_heads, n) of bool, or None
        False where a row has fewer blocks to offer than others; None when every entry counts.
    """

    ids: torch.Tensor
    valid: torch.Tensor | None

    def valid_or_all(self) -> torch.Tensor:
        """``valid``, as a tensor in either case."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.valid is None else self.valid


def everything(batch: int, heads: int, blocks: int, padding_mask: torch.Tensor | None, device: torch.device) -> Pick:
    """All blocks, for every row and head, those that are padding last; ``padding_mask`` as in :func:`choose`."""
    if padding_mask is None:
        return Pick(torch.arange(blocks, dtype=torch.int64, device=device).expand(batch, heads, blocks), None)
    order = padding_mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    valid = padding_mask.gather(1, order)
    return Pick(*(part[:, None].expand(batch, heads, blocks) for part in (order, valid)))


def choose(scores: torch.Tensor, count: int | torch.Tensor, sinks: int, padding_mask: torch.Tensor | None) -> Pick:
    """The best-scored blocks, sinks always among them.

    Parameters
    ----------
    scores : Tensor (batch, kv_heads, blocks) of float32
        Larger is better; overwritten.
    count : int or Tensor (batch,)
        Blocks to choose, for all rows or for each.
    sinks : int
        Leading real blocks of a row that are always chosen, as far as ``count`` goes.
    padding_mask : Tensor (batch, blocks) of bool, or None
        Blocks with at least one token that is no padding; None when all have.
    """
    blocks = scores.shape[2]
    if padding_mask is None:
        scores[:, :, : min(sinks, count) if isinstance(count, int) else sinks] = torch.inf
    else:
        scores.masked_fill_(~padding_mask[:, None], -torch.inf)
        most = min(sinks, count) if isinstance(count, int) else count.clamp(max=sinks)[:, None].to(padding_mask.device)
        leading = padding_mask & (padding_mask.cumsum(1) <= most)
        scores.masked_fill_(leading[:, None], torch.inf)
    most = min(blocks, count if isinstance(count, int) else int(count.max()))
    best = scores.topk(most, dim=2)
    valid = None
    if padding_mask is not None:
        valid = best.values > -torch.inf
    if not isinstance(count, int):
        within = torch.arange(most, dtype=torch.int64, device=scores.device) < count.to(scores.device)[:, None, None]
        valid = within.expand_as(best.indices) if valid is None else valid & within
    return Pick(best.indices, valid)


def pack_lists(ids: torch.Tensor, valid: torch.Tensor | None) -> BlockLists:
    """The usable entries of every list, in their order, packed to the front; on the CPU.

    ``ids`` is (batch, kv_heads, n), ``valid`` bool of the same shape, or None where every entry counts.
    """
    if valid is None:
        return BlockLists(ids.cpu(), None)
    ids, valid = ids.cpu(), valid.cpu()
    counts = valid.sum(2)
    longest = int(counts.max()) if counts.numel() else 0
    order = valid.to(torch.int8).argsort(dim=2, descending=True, stable=True)[:, :, :longest]
    return BlockLists(ids.gather(2, order).to(torch.int32), counts.to(torch.int32))
