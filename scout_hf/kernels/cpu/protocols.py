"""What kernels on the CPU take and give, by shape alone: stores with pages, and tickets of work in the background."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from scout_hf.kernels.cpu.library import Library, StoreArgs

T_co = TypeVar("T_co", covariant=True)


class Ticket(Protocol[T_co]):
    """Work in the background, to be joined by one thread at a time."""

    def wait(self) -> T_co:
        """The result; blocks until it is there, and raises what the work raised."""

    def drain(self) -> bool:
        """Block until nothing is read or written any more, whatever came of it; whether the work got through."""

    def done(self) -> bool:
        """Whether the work has ended."""

    def times(self) -> tuple[int, int] | None:
        """When it began and ended, ns of ``time.perf_counter_ns``; None while, or where, that is not known."""


class Pool(Protocol):
    """Pages in slabs."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the slabs."""

    @property
    def device(self) -> torch.device:
        """Of the slabs."""

    @property
    def slabs(self) -> tuple[torch.Tensor, ...]:
        """Where the pages are."""

    @property
    def starts(self) -> tuple[int, ...]:
        """The number of each slab's first page."""


class Table(Protocol):
    """The pages of each row, in order."""

    @property
    def pool(self) -> Pool:
        """Where the pages are."""

    @property
    def ids(self) -> torch.Tensor:
        """Page numbers, (batch, blocks) of int64 on the CPU."""

    @property
    def addresses(self) -> torch.Tensor:
        """Where the pages are in memory, in the same shape."""


class PagedStore(Protocol):
    """Keys and values in pages of ``block_size`` tokens, all rows equally long; :class:`PagedKV` is one."""

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
        """The pages."""

    def gather(self, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy blocks (batch, kv_heads, n) to tensors (batch, kv_heads, n, block_size, head_dim)."""

    def memory(self) -> tuple[Any, ...]:
        """All that ``native()`` points to."""

    def native(self) -> StoreArgs | None:
        """The store as the native library sees it, valid until it is next changed; None where that cannot be."""
