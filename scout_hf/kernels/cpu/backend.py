"""What attention over host blocks must be able to do, whoever computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from scout_hf.fusion import Partial


class CpuBackend(ABC):
    """Attention of one query per row over chosen blocks of a paged store; safe to call from several threads."""

    name: str = ""

    @abstractmethod
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
        """Attention over chosen blocks.

        Parameters
        ----------
        query : Tensor (batch, query_heads, 1, head_dim)
        store : PagedKV
            Where the blocks are, on the query's device.
        blocks : Tensor (batch, kv_heads, n) of int64
            Block numbers; the store's last block, if partly filled, stands last.
        unfilled : int
            Tokens missing at the end of the last of ``blocks``.
        scale, softcap
            As in :func:`scout_hf.kernels.attend.attend`.
        allowed : Tensor (batch, kv_heads, n, block_size) of bool, or None
            Tokens that may be attended.
        """
