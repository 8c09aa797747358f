"""The state of stores as data: nested dicts of tensors, numbers and words, and checks for what is read back."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from scout_hf.errors import SessionError

if TYPE_CHECKING:
    from scout_hf.stores.host_memory import HostMemory
    from scout_hf.stores.region import Region

State = dict[str, Any]
"""Values are tensors, :class:`Pages`, None, booleans, numbers, words, lists of these, or further states."""


class Guard(Protocol):
    """Checks pages of a file before they are first read; :class:`scout_hf.sessions.mapped.Mapped` is one."""

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to check."""

    def watched_by(self, memory: HostMemory) -> Region:
        """Let a limit count these pages too."""

    def touch(self, pages: torch.Tensor, tiles: torch.Tensor | None = None) -> None:
        """Check these tiles (None for all) of pages with these ids, both of int64; SessionError if one is wrong."""


@dataclass(frozen=True)
class Pages:
    """The content of a page table: distinct pages, and where each row has them.

    Attributes
    ----------
    order : Tensor (batch, blocks) of int64, on the CPU
        Which of the distinct pages each row has at each block.
    slabs : tuple of Tensor (pages, *page_shape)
        The distinct pages in order, in runs that are contiguous in memory.
    guards : tuple of Guard
        One for each slab, for memory that can only be read, such as that of files: a table that takes these pages
        shares it, and asks the guard before it reads. Without guards pages are copied.
    touch : callable or None
        To be called before distinct pages are read, with their numbers, (n,) of int64; SessionError if one is not what
        was written to the file that it is in.
    """

    order: torch.Tensor
    slabs: tuple[torch.Tensor, ...]
    guards: tuple[Guard, ...] = ()
    touch: Callable[[torch.Tensor], None] | None = None

    @property
    def count(self) -> int:
        """Distinct pages."""
        return sum(map(len, self.slabs))

    @property
    def page_shape(self) -> tuple[int, ...]:
        """Shape of one page; empty without pages."""
        return tuple(self.slabs[0].shape[1:]) if self.slabs else ()

    def behind(self, first: int) -> Pages:
        """Those of block ``first`` and later ones."""
        kept = self.order[:, first:]
        distinct, order = torch.unique(kept, return_inverse=True)
        starts = tuple(itertools.accumulate(map(len, self.slabs), initial=0))[:-1]
        touch = self.touch
        return Pages(
            order.view(kept.shape),
            tuple(runs(self.slabs, starts, distinct)),
            touch=None if touch is None else lambda places: touch(distinct[places]),
        )

    def check(self, batch: int, page_shape: tuple[int, ...], dtype: torch.dtype, blocks: int) -> None:
        """Raise SessionError unless these are ``blocks`` pages for each row, of that shape and dtype."""
        if self.order.shape != (batch, blocks) or self.order.dtype != torch.int64:
            raise SessionError(f"a page table of shape {tuple(self.order.shape)} was found, {(batch, blocks)} expected")
        wrong = [slab for slab in self.slabs if slab.dtype != dtype or tuple(slab.shape[1:]) != tuple(page_shape)]
        if wrong or (self.order.numel() and not self.slabs):
            found = f"{wrong[0].dtype} {tuple(wrong[0].shape[1:])}" if wrong else "none"
            raise SessionError(f"pages of {dtype} {tuple(page_shape)} were expected, and {found} were found")
        if self.order.numel() and not 0 <= int(self.order.min()) <= int(self.order.max()) < self.count:
            raise SessionError(f"a page table names pages outside of the {self.count} that there are")


def runs(slabs: Sequence[torch.Tensor], starts: Sequence[int], ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the pages ``ids`` (1-D) in order, as views (n, *page_shape) of runs that are contiguous in memory.

    Parameters
    ----------
    slabs : sequence of Tensor (pages, *page_shape)
    starts : sequence of int
        The first id of each slab.
    ids : Tensor (n,) of int64
    """
    numbers, begin = ids.tolist(), 0
    for end in range(1, len(numbers) + 1):
        if end < len(numbers) and numbers[end] == numbers[end - 1] + 1 and numbers[end] not in starts:
            continue
        which = bisect.bisect_right(starts, numbers[begin]) - 1
        first = numbers[begin] - starts[which]
        yield slabs[which][first : first + end - begin]
        begin = end


def tensor_in(
    state: Mapping[str, Any], name: str, shape: tuple[int | None, ...], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The tensor of that name; SessionError unless it has that shape (None for any size) and dtype."""
    found = state.get(name)
    if not isinstance(found, torch.Tensor):
        raise SessionError(f"{name} should be a tensor, and is {found!r}")
    fits = len(found.shape) == len(shape) and all(want in (None, have) for want, have in zip(shape, found.shape))
    if not fits or (dtype is not None and found.dtype != dtype):
        wanted = f"{dtype or 'any dtype'} {tuple('any' if size is None else size for size in shape)}"
        raise SessionError(f"{name} is {found.dtype} {tuple(found.shape)}, and {wanted} was expected")
    return found


def maybe_tensor_in(
    state: Mapping[str, Any], name: str, shape: tuple[int | None, ...], dtype: torch.dtype | None = None
) -> torch.Tensor | None:
    """As :func:`tensor_in`, or None where None was saved."""
    return None if state.get(name) is None else tensor_in(state, name, shape, dtype)


def count_in(state: Mapping[str, Any], name: str, most: int | None = None) -> int:
    """The whole number of that name, from 0 to ``most``; else SessionError."""
    found = state.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or found < 0 or (most is not None and found > most):
        limit = "" if most is None else f" and at most {most}"
        raise SessionError(f"{name} should be a whole number from 0{limit}, and is {found!r}")
    return found


def maybe_count_in(state: Mapping[str, Any], name: str, most: int | None = None) -> int | None:
    """As :func:`count_in`, or None where None was saved."""
    return None if state.get(name) is None else count_in(state, name, most)


def number_in(state: Mapping[str, Any], name: str) -> float:
    """The finite number of that name; else SessionError."""
    found = state.get(name)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise SessionError(f"{name} should be a number, and is {found!r}")
    return float(found)


def maybe_number_in(state: Mapping[str, Any], name: str) -> float | None:
    """As :func:`number_in`, or None where None was saved."""
    return None if state.get(name) is None else number_in(state, name)


def flag_in(state: Mapping[str, Any], name: str) -> bool:
    """The truth value of that name; else SessionError."""
    found = state.get(name)
    if not isinstance(found, bool):
        raise SessionError(f"{name} should be true or false, and is {found!r}")
    return found


def state_in(state: Mapping[str, Any], name: str) -> State:
    """The state of that name; else SessionError."""
    found = state.get(name)
    if not isinstance(found, dict):
        raise SessionError(f"{name} should have parts, and is {found!r}")
    return found


def pages_in(state: Mapping[str, Any], name: str) -> Pages:
    """The pages of that name; else SessionError."""
    found = state.get(name)
    if not isinstance(found, Pages):
        raise SessionError(f"{name} should be pages, and is {found!r}")
    return found


def ids_in(state: Mapping[str, Any], name: str, shape: tuple[int | None, ...], low: int, high: int) -> torch.Tensor:
    """The int64 tensor of that name, with values from ``low`` to ``high`` - 1; else SessionError."""
    found = tensor_in(state, name, shape, torch.int64)
    if found.numel() and not low <= int(found.min()) <= int(found.max()) < high:
        raise SessionError(f"{name} has numbers outside of {low} to {high - 1}")
    return found


def leaves(state: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of everything in a state that is not itself a state."""
    if isinstance(state, dict):
        for name, value in state.items():
            yield from leaves(value, (*path, name))
    else:
        yield path, state
