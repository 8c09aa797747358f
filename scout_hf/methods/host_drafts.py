"""Sparse steps of methods that are exact otherwise: to draft tokens, chosen blocks are attended where they lie."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

import torch

from scout_hf.config import ScoutConfig
from scout_hf.kernels.cpu import Attended
from scout_hf.selection import Selector
from scout_hf.step import Step
from scout_hf.stores import PagedKV, TwoTierKV
from scout_hf.stores.emulated_link import Done

if TYPE_CHECKING:
    from typing_extensions import Self

    from scout_hf.methods.base import Scoring

HERE = torch.device("cpu")
OBSERVED = 512
"""Newest queries of a prompt that digests are fitted to."""


class HostDrafts:
    """Digests of the whole blocks in one layer's host memory, and CPU attention over the top-k of them.

    Digests are made at the first draft, and then of what was written back since.

    Parameters
    ----------
    config : ScoutConfig
    layer_idx : int
    host : PagedKV
        For sizes and dtype; not stored.
    """

    uses: ClassVar[frozenset[str]] = (Selector.uses - {"gpu_kernels"}) | {"cpu_gbps"}
    """Fields of ``ScoutConfig`` that have an effect on drafts."""

    def __init__(self, config: ScoutConfig, layer_idx: int, host: PagedKV):
        # Digests are made and scored where the pages are.
        self.config = config = dataclasses.replace(config, gpu_kernels="torch")
        like = torch.empty((host.batch, host.heads, 0, host.head_dim), dtype=host.dtype, device=HERE)
        self.selector = Selector(config, layer_idx, like)

    @property
    def used_bytes(self) -> int:
        """Bytes of the digests."""
        return self.selector.used_bytes

    def observe(self, step: Step, query: torch.Tensor, kv_heads: int, scale: float) -> None:
        """Learn from the queries of a prompt, (batch, query_heads, tokens, head_dim), what digests are fitted to."""
        newest = query[:, :, -OBSERVED:].to(HERE)
        self.selector.observe(newest, kv_heads, scale, None if step.mask is None else step.padding(HERE))

    def attend(self, step: Step, query: torch.Tensor, kv: TwoTierKV, scoring: Scoring) -> Attended:
        """Attention over the chosen blocks of the host, for a query (batch, query_heads, 1, head_dim) on any device.

        The host must hold what was written back.
        """
        host, real = kv.host, query.detach().to(HERE)
        mask = None if step.mask is None else step.padding(HERE)
        self.selector.extend_from(host, host.blocks, mask)
        lists = self.selector.lists(step, real, host, host.blocks, lambda: kv.tail()[0].to(HERE))
        found = step.backend.attend_blocks(real, host, lists, *scoring, mask)
        read = found.tokens * 2 * host.head_dim * host.dtype.itemsize
        step.links.limit_cpu(Done(), read, self.config.cpu_gbps).wait()
        return found

    def crop(self, blocks: int) -> None:
        """Drop the digests of blocks from ``blocks`` on."""
        self.selector.crop(blocks)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``."""
        self.selector.select_rows(rows.to(HERE))

    def fork(self) -> Self:
        """An independent copy."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, selector=self.selector.fork())
        return twin
