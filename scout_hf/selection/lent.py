"""Selection of a layer that attends over the blocks of another layer: its own choice among the other's codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from scout_hf.config import ScoutConfig
from scout_hf.kernels.cpu.protocols import PagedStore
from scout_hf.selection.coded import Coded
from scout_hf.selection.selector import Selector


class LentSelector(Selector):
    """Chooses by the codes of another layer's selector, which alone makes, crops and reorders them.

    A digest that is fitted is fitted to the queries of that layer. If that layer is dense there are no codes, and this
    one is dense too.

    Parameters
    ----------
    config : ScoutConfig
    layer_idx : int
        The layer that chooses.
    other : Selector
        Of the layer that stores the blocks.

    Examples
    --------
    >>> import torch
    >>> from scout_hf import ScoutConfig
    >>> from scout_hf.selection import LentSelector, Selector
    >>> config, keys = ScoutConfig(block_size=16), torch.randn(1, 2, 64, 32)
    >>> other = Selector(config, 0, keys)
    >>> selector = LentSelector(config, 3, other)
    >>> other.extend(keys, None)
    >>> selector.blocks, selector.used_bytes
    (4, 0)
    """

    def __init__(self, config: ScoutConfig, layer_idx: int, other: Selector):
        self.__dict__.update(other.__dict__, _coded=None)
        self.dense = other.dense or config.is_dense(layer_idx)
        self._other = other

    @property
    def coded(self) -> Coded:
        return self._other.coded

    @property
    def used_bytes(self) -> int:
        return 0

    def observe(self, query: torch.Tensor, kv_heads: int, scale: float, mask: torch.Tensor | None) -> None:
        self._scale = scale

    def extend(
        self,
        keys: torch.Tensor,
        padding_mask: torch.Tensor | None,
        past: Callable[[], tuple[torch.Tensor, torch.Tensor | None]] | None = None,
    ) -> None:
        """Nothing to do: the other selector encodes."""

    def extend_from(self, store: PagedStore, last: int, padding_mask: torch.Tensor | None) -> None:
        """Nothing to do: the other selector encodes."""

    def extend_early(self, store: PagedStore, last: int) -> None:
        """Nothing to do: the other selector encodes."""

    def crop(self, blocks: int) -> None:
        """Nothing to do: the other selector drops its codes."""

    def select_rows(self, rows: torch.Tensor) -> None:
        """Nothing to do: the other selector reorders its codes."""

    def learn_from(self, others: Sequence[Selector | None], rows: Sequence[int]) -> None:
        """Nothing to learn for codes of another selector."""

    def fork(self) -> LentSelector:
        """The same, for :meth:`Method.borrow` to replace."""
        return self
