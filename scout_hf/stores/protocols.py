"""The interface of a layer's KV store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from scout_hf.stores.state import State

if TYPE_CHECKING:
    from typing_extensions import Self


class KVStore(Protocol):
    """Keys and values of a batch whose rows have the same length.

    :class:`PagedKV` and :class:`TwoTierKV` implement it; a method's ``kv`` may be any object that does.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.stores import KVStore, PagedKV
    >>> store: KVStore = PagedKV(1, 2, 8, 4, torch.float32, "cpu")
    >>> store.append(torch.ones(1, 2, 5, 8), torch.ones(1, 2, 5, 8))
    >>> store.length
    5
    """

    @property
    def batch(self) -> int:
        """Rows."""

    @property
    def length(self) -> int:
        """Tokens per row."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append new tokens to every row; keys and values are (batch, kv_heads, tokens, head_dim) each."""

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens ``start:stop``, (batch, kv_heads, stop - start, head_dim) each."""

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``; ``rows`` is (new_batch,) of int64."""

    def fork(self) -> Self:
        """An independent copy; it may share memory, copy on write."""

    def state_dict(self) -> State:
        """All that it holds, as views that are valid until the next change."""

    def load_state_dict(self, state: State) -> None:
        """Fill an empty store with what ``state_dict`` gave; SessionError if it does not fit."""
