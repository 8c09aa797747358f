"""Scout on one tier: block-sparse attention with the real query over one paged KV store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from scout_hf.config import ScoutConfig
from scout_hf.fusion import Partial
from scout_hf.methods.base import Method
from scout_hf.selection import LentSelector, Selector
from scout_hf.step import Step
from scout_hf.stores import PagedKV, PagePool, make_store
from scout_hf.stores.state import State, state_in

if TYPE_CHECKING:
    from typing_extensions import Self


class OneTierScout(Method):
    """Decode attends the blocks that the real query selects; no second tier, no predicted query."""

    name = "scout"
    uses = Selector.uses | {"split", "cpu_backend", "host_dtype", "host_memory", "monitor", "spill_dir"}
    blockwise = True
    kv: PagedKV

    def __init__(self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor):
        super().__init__(config, layer_idx, keys)
        batch, heads, _, dim = keys.shape
        self.kv = make_store(batch, heads, dim, config.block_size, keys.dtype, keys.device, config.host_dtype)
        self.selector = Selector(config, layer_idx, keys)

    def attend(self, step: Step, query: torch.Tensor) -> Partial:
        size, kv = self.config.block_size, self.kv
        self.selector.extend_from(kv, kv.length // size, step.mask)
        open_blocks = max(0, kv.length // size - self.config.blocks(self.config.window))
        lists = self.selector.lists(step, query, kv, open_blocks)
        result = step.backend.attend_blocks(query, kv, lists, *self.scoring, step.mask)
        step.counters.attended(self.layer_idx, step.context(), result.tokens / (kv.batch * kv.heads))
        if step.monitor is not None:
            step.monitor.watch(step, self, query, result.partial, lambda: lists and [lists], predicted=False)
        return result.partial

    def past_pages(self, step: Step) -> PagedKV | None:
        return self.kv if self.kv.device.type == "cpu" else None

    def observe(self, step: Step, query: torch.Tensor) -> None:
        self.selector.observe(query, self.kv_heads, self.scoring.scale, step.mask)

    def settle(self, step: Step) -> None:
        if step.queries > 1:
            self.selector.extend_from(self.kv, self.kv.length // self.config.block_size, step.mask)

    def flush(self) -> None:
        self.selector.extend_early(self.kv, self.kv.length // self.config.block_size)

    def rollback(self, mark: int) -> None:
        self.crop(mark)

    def crop(self, length: int) -> None:
        super().crop(length)
        self.selector.crop(length // self.config.block_size)

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        self.selector.select_rows(rows)

    def borrow(self, other: Any) -> None:
        super().borrow(other)
        self.selector = LentSelector(self.config, self.layer_idx, other.selector)

    def learn_from(self, others: Sequence[Method], rows: Sequence[int]) -> None:
        super().learn_from(others, rows)
        self.selector.learn_from([getattr(other, "selector", None) for other in others], rows)

    def fork(self) -> Self:
        twin = super().fork()
        twin.selector = self.selector.fork()
        return twin

    def state_dict(self) -> State:
        return super().state_dict() | {"selector": self.selector.state_dict()}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        kv = self.kv
        whole = kv.length // self.config.block_size
        self.selector.load_state_dict(state_in(state, "selector"), kv.batch, kv.heads, whole, kv.device)
        if not self.selector.blocks:
            self.flush()  # codes of another digest were left out

    def pools(self) -> Sequence[PagePool]:
        return [self.kv.table.pool]

    def tier_bytes(self) -> dict[str, int]:
        if self.stored_by is not None:
            return {}
        tier = "host" if self.kv.device.type == "cpu" else "device"
        return {tier: self.kv.used_bytes, "digests": self.selector.used_bytes}
