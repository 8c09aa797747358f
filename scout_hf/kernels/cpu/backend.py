"""What attention over host blocks must be able to do, whoever computes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch

from scout_hf.fusion import Partial
from scout_hf.kernels.cpu.protocols import PagedStore, Ticket
from scout_hf.kernels.cpu.workers import Workers


class BlockLists(NamedTuple):
    """Blocks to attend, one list per row and KV head.

    ids : Tensor (batch, kv_heads, n) of int32
        Distinct block numbers, each list packed to the front; the store's partly filled block, if listed, stands last.
    counts : Tensor (batch, kv_heads) of int32, or None
        Entries that each list uses; None for all.
    """

    ids: torch.Tensor
    counts: torch.Tensor | None


class Attended(NamedTuple):
    """What a backend gives back.

    partial : Partial
        Output (batch, query_heads, 1, head_dim) and natural LSE (batch, query_heads, 1).
    tokens : int
        Tokens attended, over all rows and KV heads.
    """

    partial: Partial
    tokens: int


class CpuBackend(ABC):
    """Attention of one query per row over blocks of a paged store; safe to call from several threads.

    Parameters
    ----------
    threads : int or None
        Threads for work in the background; None leaves it to the backend.
    """

    name: str = ""

    def __init__(self, threads: int | None = None):
        self.threads = threads
        self._workers = Workers(threads)

    @abstractmethod
    def attend_blocks(
        self,
        query: torch.Tensor,
        store: PagedStore,
        lists: BlockLists | None,
        scale: float,
        softcap: float | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> Attended:
        """Attention over listed blocks, or over all.

        Parameters
        ----------
        query : Tensor (batch, query_heads, 1, head_dim)
        store : PagedKV
            Where the blocks are.
        lists : BlockLists or None
            None for every block.
        scale, softcap
            As in :func:`scout_hf.kernels.attend.attend`.
        padding_mask : Tensor (batch, tokens) of bool, or None
            Tokens that are no padding, at least as many as the store has; None when all are real.
        """

    def start(
        self,
        query: torch.Tensor,
        store: PagedStore,
        lists: BlockLists | None,
        scale: float,
        softcap: float | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> Ticket[Attended]:
        """``attend_blocks`` in the background: a ticket whose ``wait()`` gives its result.

        Nothing that was handed over may change before the ticket is joined.
        """
        return self._workers.submit(self.attend_blocks, query, store, lists, scale, softcap, padding_mask)

    def watches(self, query: torch.Tensor, store: PagedStore) -> bool:
        """Whether :meth:`start_at` serves such a query and store."""
        return False

    def start_at(
        self,
        words: tuple[torch.Tensor, int, torch.Tensor],
        into: tuple[torch.Tensor, torch.Tensor],
        query: torch.Tensor,
        store: PagedStore,
        lists: BlockLists,
        scale: float,
        softcap: float | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> Ticket[Attended]:
        """``start``, but the job begins when a word says so: query and lists may be written until then.

        Parameters
        ----------
        words : (Tensor, int, Tensor)
            Word of int64 that becomes the number when the job may begin, the number, and a word that becomes the number
            when the job has ended, whatever came of it.
        into : (Tensor, Tensor)
            Contiguous float32 for output and LSE.
        query, store, lists, scale, softcap, padding_mask : as above
            ``lists`` with counts.
        """
        raise NotImplementedError

    def select(
        self,
        scorer: str,
        query: torch.Tensor,
        codes: torch.Tensor,
        count: int | torch.Tensor,
        sinks: int,
        newest: int,
        block_size: int,
        padding_mask: torch.Tensor | None,
    ) -> BlockLists | None:
        """The best-scored blocks in ascending order, sinks always among them, and behind them the newest blocks.

        None if this backend has no way of its own to score such digests; the caller then scores and chooses with torch.

        Parameters
        ----------
        scorer : str
            How to score, a digest's ``native`` name. ``"minmax"``: bounds as of :class:`MinMax`. ``"sign"``: uint8
            codes as of :class:`SignCode`. ``"dots"``: the query is one vector of weights per KV head, (batch, kv_heads,
            1, n), codes are one or several rows of ``n`` floats or int8, of which the best product counts.
            ``"dots4"``: the same with two whole numbers of four bits per byte, the lower half first.
        query : Tensor (batch, query_heads, 1, head_dim)
            Already in the space of the codes.
        codes : Tensor (batch, kv_heads, blocks, code)
            Digests of the blocks open to choice.
        count : int or Tensor (batch,)
            Blocks to choose, for all rows or for each.
        sinks, newest : int
            Leading real blocks that are always chosen; blocks behind those open to choice that are always listed.
        block_size : int
        padding_mask : as above
        """
        return None

    def score(self, scorer: str, query: torch.Tensor, codes: torch.Tensor, block_size: int = 1) -> torch.Tensor | None:
        """Scores (batch, kv_heads, blocks) of float32 of all these digests, as in ``select``; None if it has no way."""
        return None

    def copy(self, sources: torch.Tensor, targets: torch.Tensor, copy_bytes: int, keep: Any) -> Ticket[Any] | None:
        """Copies of ``copy_bytes`` bytes each between addresses, int64 on the CPU, in the background: a ticket.

        ``keep`` holds the memory on both sides. None if this backend has no way of its own.
        """
        return None

    def busy(self) -> bool:
        """Whether torch works in the background; what can wait for it should."""
        return self._workers.busy()

    def close(self) -> None:
        """End the threads; they start again when needed."""
        self._workers.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> CpuBackend:
        return type(self)(self.threads)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.threads,)
