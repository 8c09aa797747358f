"""Scout where there is only one memory: block-sparse attention with the real query over one paged copy of KV."""

from __future__ import annotations

import torch

from scout_hf.config import ScoutConfig
from scout_hf.fusion import Partial
from scout_hf.methods.base import Method
from scout_hf.selection import Selector
from scout_hf.stores import PagedKV


class OneTierScout(Method):
    """No second copy of KV, no prediction: decode attends to the blocks that the real query picks."""

    name = "scout"

    def __init__(self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor):
        super().__init__(config, layer_idx, keys)
        batch, heads, _, dim = keys.shape
        self.kv = PagedKV(batch, heads, dim, config.block_size, keys.dtype, keys.device)
        self.selector = Selector(config, layer_idx)

    def attend(self, step, query: torch.Tensor) -> Partial:
        self._digest_whole_blocks(step)
        size, blocks = self.config.block_size, self.kv.blocks
        open_blocks = max(0, self.kv.length // size - self.config.blocks(self.config.window))
        pick = self.selector.pick(step, query, open_blocks, self.kv_heads)
        newest = torch.arange(open_blocks, blocks).expand(*pick.ids.shape[:2], -1)
        ids = torch.cat([pick.ids.cpu(), newest], dim=2)
        allowed = self._allowed(step, pick, ids)
        unfilled = blocks * size - self.kv.length
        attended = ids.shape[2] * size - unfilled if allowed is None else allowed.sum() / ids[:, :, 0].numel()
        step.counters.attended(self.layer_idx, self._context(step), attended)
        return step.backend.attend_blocks(query, self.kv, ids, unfilled, *self.scoring, allowed)

    def settle(self, step) -> None:
        if step.queries > 1:
            self._digest_whole_blocks(step)

    def crop(self, length: int) -> None:
        super().crop(length)
        self.selector.crop(length // self.config.block_size)

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        self.selector.select_rows(rows)

    def fork(self) -> OneTierScout:
        twin = super().fork()
        twin.selector = self.selector.fork()
        return twin

    def tier_bytes(self) -> dict[str, int]:
        tier = "host" if self.kv.table.pool.device.type == "cpu" else "device"
        return {tier: self.kv.used_bytes, "digests": self.selector.table.used_bytes}

    def _digest_whole_blocks(self, step) -> None:
        first, last = self.selector.blocks, self.kv.length // self.config.block_size
        if self.selector.dense or first >= last:
            return
        keys, _ = self.kv.read(first * self.config.block_size, last * self.config.block_size)
        exists = None
        if step.mask is not None:
            exists = step.token_mask(self.config.block_size, keys.device)[:, first:last]
        self.selector.extend(keys, exists)

    def _allowed(self, step, pick, ids: torch.Tensor) -> torch.Tensor | None:
        if step.mask is None and pick.usable is None:
            return None
        batch, heads, count = ids.shape
        allowed = torch.ones((batch, heads, count, self.config.block_size), dtype=torch.bool)
        if step.mask is not None:
            tokens = step.token_mask(self.config.block_size, ids.device)
            rows = torch.arange(batch)[:, None, None]
            allowed &= tokens[rows, ids]
        if pick.usable is not None:
            allowed[:, :, : pick.ids.shape[2]] &= pick.usable.cpu().unsqueeze(-1)
        return allowed.to(self.kv.table.pool.device)

    def _context(self, step) -> int | torch.Tensor:
        return self.kv.length if step.mask is None else step.row_tokens().float().mean()
