"""Exact offloading: every decode step copies all KV to the device, one layer ahead (HeadInfer, arXiv 2502.12574)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from scout_hf.config import ScoutConfig
from scout_hf.errors import ConfigError
from scout_hf.fusion import Partial, fuse
from scout_hf.kernels.attend import attend
from scout_hf.methods.base import register_method
from scout_hf.methods.host_drafts import HostDrafts
from scout_hf.methods.offloading import OFFLOADING, OffloadingMethod
from scout_hf.methods.streaming import Piece
from scout_hf.step import Role, Step
from scout_hf.stores.state import State

if TYPE_CHECKING:
    from typing_extensions import Self


@register_method
class Dense(OffloadingMethod):
    """Exact offloading: all KV but the newest blocks is on the host, and copied to the device in every decode step.

    While a layer is attended, the next layer's KV is copied into a second buffer; the first layer's KV during the last
    layer of the previous step. ``method_options={"heads": n}`` copies ``n`` KV heads at a time, so that the device
    holds three pieces of that size instead of two whole layers.

    Steps that draft attend to chosen blocks in host memory instead, see :class:`HostDrafts`.

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
    can_draft = True
    can_lend = True
    uses_in_drafts = HostDrafts.uses

    def __init__(self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor):
        super().__init__(config, layer_idx, keys)
        self.drafts: HostDrafts | None = None

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
        # Right behind the layer that stores its KV it would copy before that layer has written back.
        return self.query_shape is not None and self.kv.host.blocks > 0 and self.stored_by != self.layer_idx - 1

    def ahead(self, step: Step, query: torch.Tensor | None) -> None:
        if step.role is not Role.DRAFT:
            self._start(step)

    def observe(self, step: Step, query: torch.Tensor) -> None:
        if step.drafts:
            self._drafts().observe(step, query, self.kv_heads, self.scoring.scale)

    def attend(self, step: Step, query: torch.Tensor) -> Partial:
        return self._draft(step, query) if step.role is Role.DRAFT else self._attend_all(step, query)

    def settle(self, step: Step) -> None:
        if step.role is not Role.DRAFT:  # its tokens are taken back
            super().settle(step)

    def end_step(self) -> None:
        """Nothing to drop: the first layer's copy is for the next step."""

    # -- structure ----------------------------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        super().crop(length)
        self._fit_drafts()

    def rollback(self, mark: Any) -> None:
        super().rollback(mark)
        self._fit_drafts()

    def _fit_drafts(self) -> None:
        if self.drafts is not None:
            self.drafts.crop(self.kv.host.blocks)

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        if self.drafts is not None:
            self.drafts.select_rows(rows)

    def fork(self) -> Self:
        twin = super().fork()
        twin.drafts = self.drafts and self.drafts.fork()
        return twin

    def state_dict(self) -> State:
        # Digests of drafts are made again.
        return super().state_dict()

    def tier_bytes(self) -> dict[str, int]:
        drafts = self.drafts  # read once: another thread may be decoding
        return super().tier_bytes() | ({} if drafts is None else {"digests": drafts.used_bytes})

    # -- the parts of a step ------------------------------------------------------------------------------------

    def _start(self, step: Step) -> None:
        """Start the first copy of this layer's next exact step."""
        self.stream.drop()
        self.stream.start(self._pieces(self._first_block(step)), self._bringer(step))

    def _attend_all(self, step: Step, query: torch.Tensor) -> Partial:
        parts = [self._attend_tail(step, query)]
        if self.kv.host.blocks:
            parts.append(self._attend_host(step, query, self._first_block(step)))
        step.counters.attended(self.layer_idx, step.context(), step.context())
        return fuse(parts)

    def _draft(self, step: Step, query: torch.Tensor) -> Partial:
        parts, mask = [self._attend_tail(step, query)], self.padding_mask(step, self.kv.host.length)
        attended: float | torch.Tensor = self.kv.length - self.kv.host.length
        if mask is not None:
            attended = mask.sum(dtype=torch.float32) / self.batch
        if self.kv.host.blocks:
            self.written.finish()
            found = self._drafts().attend(step, query, self.kv, self.scoring)
            parts.append(Partial(*(part.to(query.device) for part in found.partial)))
            attended = attended + found.tokens / (self.batch * self.kv_heads)
        step.counters.attended(self.layer_idx, step.context(), attended)
        return fuse(parts)

    def _drafts(self) -> HostDrafts:
        if self.drafts is None:
            self.drafts = HostDrafts(self.config, self.layer_idx, self.kv.host)
        return self.drafts

    def _first_block(self, step: Step) -> int:
        """The first block to copy."""
        return 0

    def _pieces(self, first: int) -> list[Piece]:
        """The copies of the blocks from ``first`` on: some KV heads each."""
        most, last = self.settings["heads"] or self.kv_heads, self.kv.host.blocks
        heads = [slice(head, min(head + most, self.kv_heads)) for head in range(0, self.kv_heads, most)]
        return [Piece(first, last, each) for each in heads]

    def _attend_host(self, step: Step, query: torch.Tensor, first: int) -> Partial:
        """Attention over the host blocks from ``first`` on, piece by piece, while the next piece is in flight."""
        group, size = query.shape[1] // self.kv_heads, self.config.block_size
        padding_mask, parts = self.padding_mask(step, first * size, self.kv.host.length), []
        for piece, coming in self.stream.each(self._pieces(first), self._bringer(step), ahead=1):
            keys, values = self._wait(step, coming)
            chosen = query[:, piece.heads.start * group : piece.heads.stop * group]
            parts.append(attend(chosen, keys, values, *self.scoring, padding_mask))
            step.counters.recalled(self.layer_idx, self._blocks_of(piece), coming.nbytes)
        return parts[0] if len(parts) == 1 else Partial(*(torch.cat(each, dim=1) for each in zip(*parts)))

    def _blocks_of(self, piece: Piece) -> int:
        return (piece.last - piece.first) * self.batch * (piece.heads.stop - piece.heads.start)
