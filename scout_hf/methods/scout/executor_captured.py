"""The operations of a decode step that is captured to be replayed, see :mod:`scout_hf.graph`.

A replay runs no Python: numbers that change from step to step are read on the device, from the step's clock, and
buffers are taken whole, of which only the device knows how much is filled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scout_hf.fusion import Partial
from scout_hf.methods.scout.executor import CaptureExecutor
from scout_hf.step import Step

if TYPE_CHECKING:
    from scout_hf.graph import Clock
    from scout_hf.methods.scout.executor_triton import TritonExecutor
    from scout_hf.methods.scout.policy import TwoTierScout as Layer


class CapturedExecutor(CaptureExecutor):
    """A view of a ``TritonExecutor`` while a step is captured; what the CPU does is asked for before each replay.

    Parameters
    ----------
    plain : TritonExecutor
        Keeps all that stays.
    clock : Clock
    """

    def __init__(self, plain: TritonExecutor, clock: Clock):
        self.plain, self.clock = plain, clock

    def append(self, layer: Layer, step: Step, keys: torch.Tensor, values: torch.Tensor) -> None:
        clock, size = self.clock, layer.config.block_size
        self.plain.kernels.append_token(keys, values, *layer.kv.buffers(), clock.length, clock.blocks, size)

    def select(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        plain, clock, selector, state = self.plain, self.clock, layer.selector, layer.state
        wanted, block_mask = selector.count(step, layer.kv.host.blocks), None
        count = plain.handoff.mail.capacity if wanted is None else wanted
        if wanted is None:
            capacity = plain.wanted.shape[2]
            scores = torch.zeros((len(query), layer.kv_heads, capacity), dtype=torch.float32, device=query.device)
        else:
            scores = selector.scores(step, query, selector.table.all_codes(), clock.blocks)
        if step.mask is not None:
            block_mask = clock.block_mask(layer.config.block_size, scores.shape[2])
        state.pick = plain.choose(layer, layer.resident, scores, count, block_mask, clock.blocks)
        if wanted is not None and count > layer.resident.slots:
            state.scores = plain.order_of(layer, scores, block_mask)

    def ask_gate(self, layer: Layer) -> tuple[bool, bool]:
        return layer.config.cpu_query == "predicted", False

    def submit_cpu(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        layer.state.started = True
        self.plain.handoff.post(query.contiguous())

    def attend_device(self, layer: Layer, step: Step, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (part.unflatten(2, (-1, layer.config.block_size)) for part in layer.kv.buffers())
        where = {"first": self.clock.blocks, "lengths": self.clock.length}
        return self.plain.attend(layer, query, (keys, values), where, self.clock.padding_mask)

    def join_cpu(self, layer: Layer, step: Step, query: torch.Tensor) -> Partial | None:
        with step.counters.timed(layer.layer_idx, "join"):
            share = self.plain.handoff.result(step)
        return None if share is None else Partial(*share)

    def merge(self, here: tuple[torch.Tensor, torch.Tensor], share: Partial | None) -> Partial:
        return self.plain.merge(here, share)

    def count(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        """Nothing: a capture is no step, and replays are counted behind each of them."""

    def recall_share(self, layer: Layer, step: Step) -> torch.Tensor | None:
        index = layer.layer_idx
        return None if layer.config.recall is None else self.clock.shares[index : index + 1]

    def recall(self, layer: Layer, step: Step, share: float | torch.Tensor) -> None:
        with layer.changing_residents() as slots:
            # What it reads was waited for before the replay, which ends with these copies.
            self.plain.swap(layer, step, slots, share)
