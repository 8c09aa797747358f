"""Top-k block selection per row and KV head, within a budget."""

from __future__ import annotations

from typing import NamedTuple

import torch

from scout_hf.kernels.cpu import BlockLists


class Pick(NamedTuple):
    """The chosen blocks of a decode step.

    ids : Tensor (batch, kv_heads, n) of int64
        Block numbers, best first; distinct within a row and KV head.
    valid : Tensor (batch, kv_heads, n) of bool, or None
        False for entries to ignore, where a row has fewer blocks than others; None if all are valid.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.selection import Pick
    >>> Pick(torch.tensor([[[2, 0]]]), None).valid_or_all()
    tensor([[[True, True]]])
    """

    ids: torch.Tensor
    valid: torch.Tensor | None

    def valid_or_all(self) -> torch.Tensor:
        """``valid``, all True if it is None."""
        return torch.ones_like(self.ids, dtype=torch.bool) if self.valid is None else self.valid


def everything(batch: int, heads: int, blocks: int, padding_mask: torch.Tensor | None, device: torch.device) -> Pick:
    """All blocks, for every row and KV head, blocks of only padding last; ``padding_mask`` as in :func:`choose`."""
    if padding_mask is None:
        return Pick(torch.arange(blocks, dtype=torch.int64, device=device).expand(batch, heads, blocks), None)
    order = padding_mask.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    valid = padding_mask.gather(1, order)
    return Pick(*(part[:, None].expand(batch, heads, blocks) for part in (order, valid)))


def choose(
    scores: torch.Tensor,
    count: int | torch.Tensor,
    sinks: int,
    padding_mask: torch.Tensor | None,
    fewer: bool = False,
) -> Pick:
    """The top-k blocks by score; sinks are always chosen.

    Parameters
    ----------
    scores : Tensor (batch, kv_heads, blocks) of float32
        Larger is better; -inf is never chosen, but for sinks. Overwritten.
    count : int or Tensor (batch,)
        Blocks to choose (k), for all rows or for each.
    sinks : int
        Leading real blocks of a row that are always chosen; they count towards ``count``.
    padding_mask : Tensor (batch, blocks) of bool, or None
        False for blocks of only padding; None if there are none.
    fewer : bool, default False
        Whether scores may be -inf.

    Returns
    -------
    Pick

    Examples
    --------
    >>> import torch
    >>> from scout_hf.selection import choose
    >>> choose(torch.tensor([[[0.1, 0.4, 0.3, 0.2]]]), count=2, sinks=1, padding_mask=None).ids
    tensor([[[0, 1]]])
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
    if padding_mask is not None or fewer:
        valid = best.values > -torch.inf
    if not isinstance(count, int):
        within = torch.arange(most, dtype=torch.int64, device=scores.device) < count.to(scores.device)[:, None, None]
        valid = within.expand_as(best.indices) if valid is None else valid & within
    return Pick(best.indices, valid)


def pack_lists(ids: torch.Tensor, valid: torch.Tensor | None) -> BlockLists:
    """Pack the valid entries of every list to the front, in order; on the CPU.

    Parameters
    ----------
    ids : Tensor (batch, kv_heads, n)
        Block numbers.
    valid : Tensor (batch, kv_heads, n) of bool, or None
        None if all entries are valid.

    Returns
    -------
    BlockLists

    Examples
    --------
    >>> import torch
    >>> from scout_hf.selection import pack_lists
    >>> lists = pack_lists(torch.tensor([[[7, 3, 5]]]), torch.tensor([[[True, False, True]]]))
    >>> lists.ids.tolist(), lists.counts.tolist()
    ([[[7, 5]]], [[2]])
    """
    if valid is None:
        return BlockLists(ids.cpu(), None)
    ids, valid = ids.cpu(), valid.cpu()
    counts = valid.sum(2)
    longest = int(counts.max()) if counts.numel() else 0
    order = valid.to(torch.int8).argsort(dim=2, descending=True, stable=True)[:, :, :longest]
    return BlockLists(ids.gather(2, order).to(torch.int32), counts.to(torch.int32))
