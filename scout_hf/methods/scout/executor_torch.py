"""The torch executor of two-tier Scout, for any device: the host syncs for every result that it needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from scout_hf.fusion import Partial, fuse
from scout_hf.kernels.attend import attend
from scout_hf.kernels.cpu import BlockLists, PagedStore, Ticket
from scout_hf.methods.scout.executor import Counted, Executor, resident_memory
from scout_hf.selection import Pick, pack_lists
from scout_hf.step import Step
from scout_hf.stores import ResidentSlots

if TYPE_CHECKING:
    from scout_hf.methods.scout.policy import TwoTierScout as Layer


class TorchExecutor(Executor):
    """Executor with torch operations: residents in a ``ResidentSlots``, recalls on a worker thread."""

    variant = "torch"
    uses = frozenset({"link_gbps", "cpu_gbps"})
    _recall: Ticket[Any] | None = None

    @property
    def recalling(self) -> bool:
        return self._recall is not None

    def select(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        state, blocks = layer.state, layer.kv.host.blocks
        state.pick = layer.selector.pick(step, query, blocks, layer.kv_heads, lambda: layer.kv.tail()[0])
        state.missing = state.pick.valid_or_all() & ~layer.resident.holds(state.pick.ids, blocks)

    def submit_cpu(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        state, host, pick = layer.state, layer.kv.host, layer.state.pick
        job = _job(layer, step, query)
        share = job[2].ids.numel() if job[2].counts is None else int(job[2].counts.sum())
        # Invalid entries fill up short rows and do not count.
        chosen = pick.ids.numel() if pick.valid is None else int(pick.valid.sum())
        state.started, state.counted = True, Counted(share, chosen)
        if share:
            ticket = step.backend.start(*job)
            read = share * 2 * host.block_size * host.head_dim * layer.dtype.itemsize
            state.ticket = step.links.limit_cpu(ticket, read, layer.config.cpu_gbps)

    def attend_device(self, layer: Layer, step: Step, query: torch.Tensor) -> list[Partial]:
        keys, values = layer.kv.tail()
        tail = _attend(layer, query, keys, values, layer.padding_mask(step, layer.kv.host.length))
        return [tail] if layer.resident is None else [_attend_residents(layer, step, query), tail]

    def join_cpu(self, layer: Layer, step: Step, query: torch.Tensor) -> Partial | None:
        state = layer.state
        if state.ticket is None:
            return None
        with step.counters.timed(layer.layer_idx, "join"):
            share = state.ticket.wait()
        # Cleared only now: after an interrupt, a rollback must still find the job to wait for.
        state.ticket = None
        state.attended += share.tokens / (query.shape[0] * layer.kv_heads)
        return Partial(*(part.to(query.device) for part in share.partial))

    def attend_again(self, layer: Layer, step: Step, query: torch.Tensor) -> Partial:
        share = step.backend.attend_blocks(*_job(layer, step, query))
        return Partial(*(part.to(query.device) for part in share.partial))

    def merge(self, here: list[Partial], share: Partial | None, dtype: torch.dtype) -> Partial:
        return fuse(here if share is None else [*here, share])

    def seen(self, layer: Layer) -> list[Pick]:
        ids = layer.resident.ids[:, :, : layer.resident.filled]
        return [Pick(ids, ids >= 0), Pick(layer.state.pick.ids, layer.state.missing)]

    # -- residents ------------------------------------------------------------------------------------------------

    def new_residents(self, layer: Layer, slots: int) -> ResidentSlots:
        host = layer.kv.host
        sizes = (host.batch, layer.kv_heads, slots, host.block_size, host.head_dim)
        with resident_memory(layer, slots):
            return ResidentSlots(*sizes, host.dtype, layer.kv.device)

    def load_residents(
        self, layer: Layer, step: Step, query: torch.Tensor, slots: ResidentSlots | None
    ) -> ResidentSlots:
        host, slots = layer.kv.host, self.new_residents(layer, layer.slots()) if slots is None else slots
        pick = layer.selector.pick(step, query, host.blocks, layer.kv_heads, whole=True)
        slots.load(pick.ids, pick.valid_or_all(), host)
        return slots

    def adopt(self, slots: ResidentSlots, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        slots.adopt(first, keys, values)

    def recall(self, layer: Layer, step: Step, share: float | torch.Tensor) -> None:
        state, host = layer.state, layer.kv.host
        if state.counted is None or state.counted.cpu < share * state.counted.chosen:
            return
        with layer.changing_residents() as resident:
            plan = resident.plan_recall(state.pick.ids, state.pick.valid_or_all(), host.blocks)
            if plan is not None:
                places: tuple[torch.Tensor, torch.Tensor, int] | None = plan.addresses(host)
                held = (resident.keys, resident.values, host.memory())
                self._recall = None if places is None else step.backend.copy(*places, keep=held)
                if self._recall is None:
                    self._recall = step.movers.submit(plan.run, host)
                self._recall = step.links.limit(self._recall, plan.moved_bytes, layer.config.link_gbps)
                step.counters.recalled(layer.layer_idx, plan.blocks, plan.moved_bytes)

    def join_recall(self, layer: Layer) -> None:
        if self._recall is not None:
            with layer.changing_residents():
                self._recall.wait()
                # Cleared only now: after an interrupt, a rollback must still find the job to wait for.
                self._recall = None

    # -- changes of the cache -------------------------------------------------------------------------------------

    def drop_job(self, layer: Layer) -> None:
        if layer.state.ticket is not None:
            layer.state.ticket.drain()

    def drain(self, layer: Layer) -> None:
        if self._recall is not None:
            if not self._recall.drain():
                layer.resident = None
            self._recall = None


def _job(
    layer: Layer, step: Step, query: torch.Tensor
) -> tuple[torch.Tensor, PagedStore, BlockLists, float, float | None, torch.Tensor | None]:
    lists = pack_lists(layer.state.pick.ids, layer.state.missing)
    padding_mask = None if step.mask is None else step.padding(lists.ids.device)
    return query.detach().cpu(), layer.kv.host, lists, *layer.scoring, padding_mask


def _attend_residents(layer: Layer, step: Step, query: torch.Tensor) -> Partial:
    resident, size = layer.resident, layer.config.block_size
    keys, values = resident.content()
    allowed = None
    if step.mask is not None or resident.gaps:
        ids = resident.ids[:, :, : resident.filled]
        allowed = (ids >= 0).unsqueeze(-1).expand(*ids.shape, size)
        if step.mask is not None:
            rows = torch.arange(len(ids), dtype=torch.int64, device=ids.device)[:, None, None]
            allowed = allowed & step.token_mask(size, ids.device)[rows, ids.clamp(min=0)]
        allowed = allowed.flatten(2).unsqueeze(2)
    return _attend(layer, query, keys, values, allowed)


def _attend(
    layer: Layer, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor | None
) -> Partial:
    tokens = keys.shape[2] if allowed is None else allowed.sum(dtype=torch.float32) / allowed.shape[:2].numel()
    layer.state.attended = layer.state.attended + tokens
    return attend(query, keys, values, *layer.scoring, allowed)
