"""The operations of a decode step during graph capture, see :mod:`scout_hf.graph`.

A replay runs no Python. Numbers that change from step to step are read on the device, from the step's clock; kernels
get whole buffers, and only the device knows how much of them is filled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scout_hf.fusion import Partial
from scout_hf.methods.scout.executor import CaptureExecutor
from scout_hf.step import Step

if TYPE_CHECKING:
    from scout_hf.graph_clock import Clock
    from scout_hf.methods.scout.executor_triton import TritonExecutor
    from scout_hf.methods.scout.policy import TwoTierScout as Layer


class CapturedExecutor(CaptureExecutor):
    """A ``TritonExecutor`` during capture. CPU work is submitted before each replay.

    Parameters
    ----------
    plain : TritonExecutor
        Holds all state.
    clock : Clock
    """

    def __init__(self, plain: TritonExecutor, clock: Clock):
        self.plain, self.clock = plain, clock

    def append(self, layer: Layer, step: Step, keys: torch.Tensor, values: torch.Tensor) -> None:
        clock, size = self.clock, layer.config.block_size
        self.plain.kernels.append_token(keys, values, *layer.kv.buffers(), clock.length, clock.blocks, size)

    def fill(self, layer: Layer) -> None:
        slots, blocks = layer.resident, self.clock.blocks
        into = slots.ids, slots.slot_of, slots.keys, slots.values
        self.plain.kernels.move_block(*layer.kv.buffers(), blocks, self.plain.pages, *into)

    def select(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        plain, clock, selector, state = self.plain, self.clock, layer.selector, layer.state
        budgeted, block_mask = selector.count(step, layer.kv.host.blocks), None
        count = plain.handoff.mail.capacity if budgeted is None else budgeted
        capacity = plain.is_chosen.shape[2] if budgeted is None else selector.table.capacity
        if step.mask is not None:
            block_mask = clock.block_mask(layer.config.block_size, capacity)
        if budgeted is None:
            scores = torch.zeros((len(query), layer.kv_heads, capacity), dtype=torch.float32, device=query.device)
        else:
            scores = selector.scores(step, query, selector.table.all_codes(), block_mask, clock.blocks)
        state.pick = plain.choose(layer, layer.resident, scores, count, block_mask, clock.blocks)
        if budgeted is not None and count > layer.resident.slots:
            state.scores = plain.order_of(layer, scores, block_mask)

    def ask_gate(self, layer: Layer, step: Step) -> tuple[bool, bool]:
        return layer.gate.predicts, False

    def submit_cpu(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        layer.state.started = True
        self.plain.handoff.post(query.contiguous())

    def attend_device(self, layer: Layer, step: Step, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (part.unflatten(2, (-1, layer.config.block_size)) for part in layer.kv.buffers())
        where = {"first": self.clock.blocks, "lengths": self.clock.length}
        return self.plain.attend(layer, step, query, (keys, values), where, self.clock.padding_mask)

    def join_cpu(self, layer: Layer, step: Step, query: torch.Tensor) -> Partial | None:
        return self.plain.handoff.result(step)

    def merge(self, here: tuple[torch.Tensor, torch.Tensor], share: Partial | None, dtype: torch.dtype) -> Partial:
        return self.plain.merge(here, share, dtype)

    def count(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        """Nothing: a capture is not a step, and replays are counted in ``after_replay``."""

    def recall_share(self, layer: Layer, step: Step) -> torch.Tensor | None:
        index = layer.layer_idx
        return None if layer.config.recall is None else self.clock.shares[index : index + 1]

    def recall(self, layer: Layer, step: Step, share: float | torch.Tensor) -> None:
        with layer.changing_residents() as slots:
            # ``prepare_replays`` waits for the host data that this reads; the graph ends after these copies.
            self.plain.swap(layer, step, slots, share)
