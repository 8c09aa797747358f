"""Protocols of the CPU kernels: paged stores, and tickets of background work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from scout_hf.kernels.cpu.library import Library, StoreArgs

T_co = TypeVar("T_co", covariant=True)


class Ticket(Protocol[T_co]):
    """A handle of background work; one thread at a time may join it.

    Examples
    --------
    >>> from scout_hf.kernels.cpu.workers import Workers
    >>> workers = Workers()
    >>> ticket = workers.submit(max, 2, 3)
    >>> ticket.wait(), ticket.done()
    (3, True)
    >>> workers.close()
    """

    def wait(self) -> T_co:
        """Block until the work has ended; return its result or raise its error."""

    def drain(self) -> bool:
        """Block until the work no longer uses its memory; returns whether it succeeded."""

    def done(self) -> bool:
        """Whether the work has ended."""

    def times(self) -> tuple[int, int] | None:
        """When it began and ended, in ns of ``time.perf_counter_ns``; None if not known (yet)."""


class StepSums(NamedTuple):
    """What jobs of decode steps have done, over all rows and KV heads.

    tokens : int
        Tokens attended.
    listed, chosen : int
        Blocks attended, and chosen in total.
    """

    tokens: int
    listed: int
    chosen: int


class StepTotals(Protocol):
    """Running sums of the jobs of one layer; keeps nothing else alive."""

    def take(self) -> StepSums:
        """What jobs have done that ended since the last call."""


class StepJob(Protocol):
    """CPU attention of one layer that is described once and started once per decode step.

    Attributes
    ----------
    layer : int
    number : int
        Jobs started so far; a job begins when its flag reaches its number.
    counted : bool
        Whether the next jobs count in ``totals``.
    """

    layer: int
    counted: bool

    @property
    def totals(self) -> StepTotals:
        """Sums over its jobs."""

    @property
    def number(self) -> int:
        """Jobs started so far."""

    def describe(
        self, store: PagedStore, scale: float, softcap: float | None, padding_mask: torch.Tensor | None
    ) -> None:
        """What the next jobs attend to, as in ``attend_blocks``; costs little where that is what they did."""

    def ticket(self) -> Ticket[Any] | None:
        """A ticket of the last job; None before the first one."""

    def drain(self) -> None:
        """Block until the last job has ended."""


class StepJobs(Protocol):
    """Jobs that are started together, in this order."""

    @property
    def jobs(self) -> Sequence[StepJob]:
        """One per layer."""


class Pool(Protocol):
    """Pages in slabs."""

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the slabs."""

    @property
    def device(self) -> torch.device:
        """Device of the slabs."""

    @property
    def slabs(self) -> tuple[torch.Tensor, ...]:
        """The tensors that hold the pages."""

    @property
    def starts(self) -> tuple[int, ...]:
        """First page id of each slab."""

    @property
    def watched(self) -> bool:
        """Whether :meth:`PagedStore.touch` must be called before pages are read through their addresses."""


class Table(Protocol):
    """A page table: the pages of each row, in order."""

    @property
    def pool(self) -> Pool:
        """The pool that holds the pages."""

    @property
    def ids(self) -> torch.Tensor:
        """Page ids, (batch, blocks) of int64 on the CPU."""

    @property
    def addresses(self) -> torch.Tensor:
        """Memory addresses of the pages, in the same shape."""


class PagedStore(Protocol):
    """A store of keys and values in pages of ``block_size`` tokens, all rows of one length; :class:`PagedKV` is one.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.kernels.cpu import PagedStore
    >>> from scout_hf.stores import PagedKV
    >>> store: PagedStore = PagedKV(1, 2, 8, 4, torch.float32, "cpu")
    >>> store.blocks
    0
    """

    heads: int
    head_dim: int
    block_size: int
    length: int
    dtype: torch.dtype
    device: torch.device
    library: Library | None
    packed: bool

    @property
    def batch(self) -> int:
        """Rows."""

    @property
    def blocks(self) -> int:
        """Blocks per row, the partly filled last one included."""

    @property
    def table(self) -> Table:
        """The page table."""

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of tokens ``start:stop``: keys and values, (batch, kv_heads, stop - start, head_dim) each."""

    def gather(self, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy blocks (batch, kv_heads, n) of int64 into tensors (batch, kv_heads, n, block_size, head_dim)."""

    def touch(self, blocks: torch.Tensor | None, counts: torch.Tensor | None = None) -> None:
        """Call it before reading blocks through their addresses: those of a file are checked then.

        ``blocks`` is (batch, kv_heads, n) of int, None for all; of each list the first ``counts`` (batch, kv_heads).
        """

    def memory(self) -> tuple[Any, ...]:
        """The tensors whose memory ``native()`` points to."""

    def native(self) -> StoreArgs | None:
        """The store as a struct of the native library, valid until the next change; None if it cannot be served."""
