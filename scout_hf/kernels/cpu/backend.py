"""The interface of a CPU backend: attention over host blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from scout_hf.fusion import Partial
from scout_hf.kernels.cpu.protocols import PagedStore, StepJob, StepJobs, Ticket
from scout_hf.kernels.cpu.workers import Workers


class BlockLists(NamedTuple):
    """Blocks to attend, one list per row and KV head.

    ids : Tensor (batch, kv_heads, n) of int32
        Distinct block numbers, each list packed to the front; the store's partly filled block, if listed, is last.
    counts : Tensor (batch, kv_heads) of int32, or None
        Used entries of each list; None for all.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.kernels.cpu import BlockLists
    >>> ids = torch.tensor([[[0, 2], [1, 0]]], dtype=torch.int32)
    >>> lists = BlockLists(ids, counts=torch.tensor([[2, 1]], dtype=torch.int32))
    """

    ids: torch.Tensor
    counts: torch.Tensor | None


class Attended(NamedTuple):
    """Result of CPU attention.

    partial : Partial
        Output (batch, query_heads, 1, head_dim) and natural LSE (batch, query_heads, 1).
    tokens : int
        Tokens attended, over all rows and KV heads.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.kernels.cpu import Attended, make_backend
    >>> from scout_hf.stores import PagedKV
    >>> store = PagedKV(1, 1, 8, 4, torch.float32, "cpu")
    >>> store.append(*torch.randn(2, 1, 1, 5, 8))
    >>> result: Attended = make_backend("torch").attend_blocks(torch.randn(1, 2, 1, 8), store, None, scale=1.0)
    >>> result.tokens
    5
    """

    partial: Partial
    tokens: int


class ByMass(NamedTuple):
    """Blocks are chosen until they hold a share of the attention mass; see ``ScoutConfig.mass``.

    mass : float
        The share.
    least : int
        Blocks that are chosen in any case, sinks included.
    recent : Tensor (batch, query_heads) of float32, or None
        Logarithms, base 2, of the mass of the newest tokens, which are not among the candidates.
    """

    mass: float
    least: int
    recent: torch.Tensor | None


class Coarse(NamedTuple):
    """How to tell which blocks are worth scoring by their whole codes; see :mod:`scout_hf.selection.coarse`.

    dim : int
        The first dimensions of a code, by which all blocks are scored.
    fine : int
        Blocks that are then scored by all dimensions.
    """

    dim: int
    fine: int


class CpuBackend(ABC):
    """Attention of one query per row over blocks of a paged store; thread-safe.

    Parameters
    ----------
    threads : int or None
        Threads for background jobs; None leaves the number to the backend.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.kernels.cpu import CpuBackend, make_backend
    >>> from scout_hf.stores import PagedKV
    >>> store = PagedKV(1, 1, 8, 4, torch.float32, "cpu")
    >>> store.append(*torch.randn(2, 1, 1, 5, 8))
    >>> backend: CpuBackend = make_backend("torch", threads=1)
    >>> ticket = backend.start(torch.randn(1, 2, 1, 8), store, None, scale=1.0)
    >>> ticket.wait().tokens
    5
    >>> backend.close()
    """

    name: str = ""
    spin_us = 100
    """Microseconds for which native threads look out for work before they sleep; set before the first job."""

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
        lists : BlockLists or None
            None for all blocks.
        scale, softcap
            As in :func:`scout_hf.kernels.attend.attend`.
        padding_mask : Tensor (batch, tokens) of bool, or None
            False for padding; must cover the tokens of the store. None if there is no padding.

        Returns
        -------
        Attended
        """

    def attend_past(
        self,
        query: torch.Tensor,
        store: PagedStore,
        tokens: int,
        scale: float,
        softcap: float | None = None,
        padding_mask: torch.Tensor | None = None,
        first: int = 0,
    ) -> Partial | None:
        """Attention of several queries per row over tokens ``first:tokens``, in one read of them.

        Parameters
        ----------
        query : Tensor (batch, query_heads, queries, head_dim)
        store : PagedKV
        tokens : int
            All queries see all of them.
        scale, softcap, padding_mask
            As in :meth:`attend_blocks`.
        first : int
            The first token of a block.

        Returns
        -------
        Partial or None
            None if this backend does not support it, or gains nothing by it; the caller then copies the tokens.
        """
        return None

    def gains_by_many(self, query: torch.Tensor, store: PagedStore) -> bool:
        """Whether ``attend_past`` is faster than matrix products of torch for any number of such queries."""
        return False

    def start(
        self,
        query: torch.Tensor,
        store: PagedStore,
        lists: BlockLists | None,
        scale: float,
        softcap: float | None = None,
        padding_mask: torch.Tensor | None = None,
    ) -> Ticket[Attended]:
        """Run ``attend_blocks`` in the background; parameters as there.

        No argument may change before the ticket is joined.

        Returns
        -------
        Ticket of Attended
        """
        return self._workers.submit(self.attend_blocks, query, store, lists, scale, softcap, padding_mask)

    def watches(self, query: torch.Tensor, store: PagedStore) -> bool:
        """Whether :meth:`prepare` supports this query and store."""
        return False

    def prepare(
        self,
        words: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        into: Partial,
        query: torch.Tensor,
        lists: BlockLists,
        chosen: torch.Tensor,
        layer: int,
    ) -> StepJob:
        """Attention of one layer that begins when a flag is set, once per decode step.

        Call ``describe`` of the job before the first start, and after the store or the padding mask has changed.

        Parameters
        ----------
        words : (Tensor, Tensor, Tensor) of int64, (1,) each
            Flag that starts job ``n`` when it reaches ``n``; flag that job ``n`` sets to ``n`` when it has ended, also
            after an error; a word that is set to a negative number after an error.
        into : Partial
            Output and LSE, contiguous float32.
        query, lists
            As in :meth:`attend_blocks`; may be written until the flag is set. ``lists`` must have counts.
        chosen : Tensor (batch, kv_heads) of int32
            Blocks chosen in total, for ``totals``.
        layer : int
            For reports.

        Returns
        -------
        StepJob

        Raises
        ------
        NotImplementedError
            Where :meth:`watches` is False.
        """
        raise NotImplementedError

    def together(self, jobs: Sequence[StepJob]) -> StepJobs:
        """Jobs of this backend that :meth:`start_step` starts in this order."""
        raise NotImplementedError

    def start_step(self, jobs: StepJobs) -> Ticket[Any]:
        """Start one job of each layer, in one native call: all or none.

        Returns
        -------
        Ticket
            Of the last job.
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
        by_mass: ByMass | None = None,
        coarse: Coarse | None = None,
    ) -> BlockLists | None:
        """The top-k blocks by score in ascending order, sinks included, followed by the newest blocks.

        Parameters
        ----------
        scorer : str
            A digest's ``native`` name. ``"minmax"``: bounds of :class:`MinMax`. ``"sign"``: uint8 codes of
            :class:`SignCode`, ranked by :func:`scout_hf.selection.group_mass.mean_share`. ``"dots"``: the query is one
            vector of weights per KV head, (batch, kv_heads, 1, n), codes are one or several rows of ``n`` floats or
            int8, and the largest dot product is the score. ``"dots4"``: the same with two 4-bit integers per byte, the
            lower half first.
        query : Tensor (batch, query_heads, 1, head_dim)
            As returned by ``Digest.prepare``.
        codes : Tensor (batch, kv_heads, blocks, code)
            Digests of the candidate blocks.
        count : int or Tensor (batch,)
            Blocks to choose (k), for all rows or for each.
        sinks : int
            Leading real blocks that are always chosen.
        newest : int
            Blocks after the candidates, which are always listed.
        block_size : int
        padding_mask
            As in :meth:`attend_blocks`.
        by_mass : ByMass or None
            For ``"sign"``: choose fewer than ``count`` blocks where those hold enough of the attention mass.
        coarse : Coarse or None
            For ``"sign"``, without ``by_mass``: score by whole codes only the blocks that are best by their first
            dimensions.

        Returns
        -------
        BlockLists or None
            None if this backend cannot score such digests; the caller then uses torch.
        """
        return None

    def score(self, scorer: str, query: torch.Tensor, codes: torch.Tensor, block_size: int = 1) -> torch.Tensor | None:
        """Scores as a digest's ``score`` returns them; arguments as in :meth:`select`; None if not supported."""
        return None

    def copy(self, sources: torch.Tensor, targets: torch.Tensor, copy_bytes: int, keep: Any) -> Ticket[Any] | None:
        """Copy memory in the background.

        Parameters
        ----------
        sources, targets : Tensor (n,) of int64, on the CPU
            Addresses.
        copy_bytes : int
            Bytes of each copy.
        keep
            Objects that own the memory; kept alive until the copies have ended.

        Returns
        -------
        Ticket or None
            None if not supported.
        """
        return None

    def busy(self) -> bool:
        """Whether a background job runs torch operations; less urgent work should wait."""
        return self._workers.busy()

    def close(self) -> None:
        """End the threads; a later job starts them again."""
        self._workers.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> CpuBackend:
        return _again(type(self), self.threads, self.spin_us)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.threads, self.spin_us)


def _again(kind: type[CpuBackend], threads: int | None, spin_us: int) -> CpuBackend:
    backend = kind(threads)
    backend.spin_us = spin_us
    return backend
