"""Exact offloading: every decode step copies all KV to the device, one layer ahead (HeadInfer, arXiv 2502.12574)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scout_hf.config import ScoutConfig
from scout_hf.errors import ConfigError
from scout_hf.fusion import Partial, fuse
from scout_hf.kernels.attend import attend
from scout_hf.methods.base import register_method
from scout_hf.methods.host_to_device import InFlightCopy, blocks_to_device
from scout_hf.methods.offloading import OFFLOADING, OffloadingMethod
from scout_hf.step import Step
from scout_hf.stores.state import State

if TYPE_CHECKING:
    from typing_extensions import Self


@register_method
class Dense(OffloadingMethod):
    """Exact offloading: all KV but the newest blocks is on the host, and copied to the device in every decode step.

    While a layer is attended, the next layer's KV is copied into a second buffer; the first layer's KV during the last
    layer of the previous step. ``method_options={"heads": n}`` copies ``n`` KV heads at a time, so that the device
    holds three pieces of that size instead of two whole layers.

    Examples
    --------
    >>> from scout_hf import ScoutConfig
    >>> from scout_hf.methods import Dense
    >>> config = ScoutConfig(method="dense", method_options={"heads": 2})
    >>> Dense.check(config)
    """

    name = "dense"
    blockwise = True
    options = {"heads": None}
    uses = OFFLOADING | {"window", "link_gbps"}
    needs_query = False

    def __init__(self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor):
        super().__init__(config, layer_idx, keys)
        # In-flight copies, in the order of use.
        self._coming: list[InFlightCopy] = []

    @classmethod
    def check(cls, config: ScoutConfig) -> None:
        super().check(config)
        heads = (config.method_options or {}).get("heads")
        if heads is not None and (isinstance(heads, bool) or not isinstance(heads, int) or heads < 1):
            raise ConfigError(
                f"heads={heads!r} is not allowed: heads is the number of KV heads per copy, 1 or more; try None for all"
            )

    @classmethod
    def is_exact(cls, config: ScoutConfig, device: torch.device) -> bool:
        return True

    # -- hooks --------------------------------------------------------------------------------------------------

    @property
    def wants_ahead(self) -> bool:
        return self.query_shape is not None and self.kv.host.blocks > 0

    def ahead(self, step: Step, query: torch.Tensor | None) -> None:
        self._drop_coming()
        self._coming.append(self._bring(step, self._first_block(step), self._pieces()[0]))

    def attend(self, step: Step, query: torch.Tensor) -> Partial:
        parts = [self._attend_tail(step, query)]
        if self.kv.host.blocks:
            parts.append(self._attend_host(step, query, self._first_block(step)))
        step.counters.attended(self.layer_idx, step.context(), step.context())
        return fuse(parts)

    # -- structure ----------------------------------------------------------------------------------------------

    def fork(self) -> Self:
        twin = super().fork()
        twin._coming = []
        return twin

    def state_dict(self) -> State:
        # Nothing else is held between two passes.
        return super().state_dict()

    def drain(self) -> None:
        self._drop_coming()

    # -- the parts of a step ------------------------------------------------------------------------------------

    def _first_block(self, step: Step) -> int:
        """The first block to copy."""
        return 0

    def _pieces(self) -> list[slice]:
        """The KV heads of each copy."""
        most = self.settings["heads"] or self.kv_heads
        return [slice(first, min(first + most, self.kv_heads)) for first in range(0, self.kv_heads, most)]

    def _bring(self, step: Step, first: int, heads: slice) -> InFlightCopy:
        self.written.finish()
        host = self.kv.host
        return blocks_to_device(step, host, first, host.blocks, heads, self.kv.device, self.config.link_gbps)

    def _attend_host(self, step: Step, query: torch.Tensor, first: int) -> Partial:
        """Attention over the host blocks from ``first`` on, piece by piece, while the next piece is in flight."""
        pieces, group, size = self._pieces(), query.shape[1] // self.kv_heads, self.config.block_size
        if self._coming and self._coming[0].what != (first, self.kv.host.blocks, pieces[0]):
            self._drop_coming()  # started before tokens were appended outside a step
        if not self._coming:
            self._coming.append(self._bring(step, first, pieces[0]))
        padding_mask, parts = self.padding_mask(step, first * size, self.kv.host.length), []
        for number, heads in enumerate(pieces):
            if number + 1 < len(pieces):
                self._coming.append(self._bring(step, first, pieces[number + 1]))
            here = self._coming[0]
            keys, values = self._wait(step, here)
            chosen = query[:, heads.start * group : heads.stop * group]
            parts.append(attend(chosen, keys, values, *self.scoring, padding_mask))
            step.counters.recalled(self.layer_idx, self._blocks_of(heads, first), here.nbytes)
            self._coming.pop(0).give_back()
        return parts[0] if len(parts) == 1 else Partial(*(torch.cat(each, dim=1) for each in zip(*parts)))

    def _wait(self, step: Step, coming: InFlightCopy) -> tuple[torch.Tensor, torch.Tensor]:
        with step.counters.timed(self.layer_idx, "join"):
            return coming.wait()

    def _blocks_of(self, heads: slice, first: int) -> int:
        return (self.kv.host.blocks - first) * self.batch * (heads.stop - heads.start)

    def _drop_coming(self) -> None:
        while self._coming:
            self._coming[0].drain()
            self._coming.pop(0).give_back()
