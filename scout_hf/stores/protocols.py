"""What a method can keep a layer's keys and values in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from typing_extensions import Self


class KVStore(Protocol):
    """Keys and values of a batch whose rows are equally long; :class:`PagedKV` and :class:`TwoTierKV` are such."""

    @property
    def batch(self) -> int:
        """Rows."""

    @property
    def length(self) -> int:
        """Tokens per row."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store new tokens of every row; (batch, kv_heads, tokens, head_dim) each."""

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens ``start:stop``, (batch, kv_heads, stop - start, head_dim) each."""

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row ``i`` what row ``rows[i]`` was."""

    def fork(self) -> Self:
        """A second store that is independent of this one."""
