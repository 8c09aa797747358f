"""What a model with an indexer chose to attend to, for each query of a pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scout_hf.kernels.cpu import BlockLists
from scout_hf.selection.pick import pack_lists

if TYPE_CHECKING:
    from scout_hf.kernels.cpu.protocols import PagedStore


class OwnChoice:
    """The blocks or tokens that a layer attends to.

    Parameters
    ----------
    indices : Tensor (batch, heads, queries, n) of int
        Numbers of blocks, distinct for each query, negative for none. One head for all KV heads, or one for each group
        of as many.
    size : int
        Tokens of a block; 1 where tokens are chosen.

    Attributes
    ----------
    mean_if_empty : bool
        Whether a query that chose padding alone gets the mean of all values, as in stock; 0 otherwise.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.selection.own_choice import OwnChoice
    >>> choice = OwnChoice(torch.tensor([[[[2, 0, -1]]]]), size=2)
    >>> choice.tokens(0, 1, tokens=6).int().tolist()
    [[[[1, 1, 0, 0, 1, 1]]]]
    """

    mean_if_empty = True

    def __init__(self, indices: torch.Tensor, size: int):
        self.indices, self.size = indices, size
        self.heads, self.queries = indices.shape[1:3]

    def tokens(self, first: int, last: int, tokens: int) -> torch.Tensor:
        """What queries ``first:last`` chose of the first ``tokens``, (batch, heads, last - first, tokens) of bool."""
        indices = self.indices[:, :, first:last].long()
        blocks = -(-tokens // self.size)
        chosen = indices.new_zeros((*indices.shape[:3], blocks + 1), dtype=torch.bool)
        # The column behind the last block takes what stands for none.
        chosen.scatter_(-1, indices.masked_fill(indices < 0, blocks), True)
        chosen = chosen[..., :blocks]
        return chosen if self.size == 1 else chosen.repeat_interleave(self.size, dim=-1)[..., :tokens]

    def lists(self, store: PagedStore, padding_mask: torch.Tensor | None) -> tuple[BlockLists, torch.Tensor | None]:
        """What the newest query attends to, as blocks of a store and a mask of the tokens in them.

        Parameters
        ----------
        store : PagedKV
            With blocks of ``size`` tokens, or of more where one choice is for all heads.
        padding_mask : Tensor (batch, tokens) of bool, or None

        Returns
        -------
        lists : BlockLists
            In ascending order.
        mask : Tensor (batch, tokens) of bool, or None
        """
        if store.block_size == self.size:
            ids = self.indices[:, :, -1].cpu().long()
            ids = ids.masked_fill(ids < 0, store.blocks).sort(dim=-1).values
            ids = ids.repeat_interleave(store.heads // ids.shape[1], dim=1)
            return pack_lists(ids, ids < store.blocks), padding_mask
        chosen = self.tokens(self.queries - 1, self.queries, store.length)[:, 0, 0].to(store.device)
        if padding_mask is not None:
            chosen = chosen & padding_mask[:, : store.length]
        ids, valid = self._blocks_of(chosen, store.block_size)
        lists = pack_lists(ids[:, None].expand(-1, store.heads, -1), valid[:, None].expand(-1, store.heads, -1))
        return lists, chosen

    def _blocks_of(self, chosen: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks of ``size`` tokens with a chosen one, ascending, and which entries count; (batch, n) each."""
        ids = self.indices[:, 0, -1].cpu().long().div(size, rounding_mode="floor").sort(dim=-1).values
        again = ids == ids.roll(1, dims=-1)
        again[:, 0] = False
        return ids, ~again & (ids >= 0) & (ids < -(-chosen.shape[1] // size))


class ChoiceByMask(OwnChoice):
    """The same from a mask.

    Parameters
    ----------
    mask : Tensor (batch, 1, queries, tokens) of bool
        True for what is attended.
    """

    def __init__(self, mask: torch.Tensor):
        self.mask, self.size = mask, 1
        self.heads, self.queries = mask.shape[1:3]

    def tokens(self, first: int, last: int, tokens: int) -> torch.Tensor:
        return self.mask[:, :, first:last, :tokens]

    def _blocks_of(self, chosen: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        padded = torch.nn.functional.pad(chosen, (0, -chosen.shape[1] % size)).cpu()
        some = padded.view(len(chosen), -1, size).any(-1)
        return torch.arange(some.shape[1], dtype=torch.int64, device="cpu").expand_as(some), some
