"""The Triton executor of two-tier Scout: a sync-free decode step.

Chosen blocks, slots and their maps stay on the device. Block lists and queries go to the CPU through a
:class:`Mailbox`. Write-back and recall run on side streams.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from scout_hf.config import ScoutConfig
from scout_hf.errors import CacheStateError, ConfigError
from scout_hf.fusion import Partial
from scout_hf.kernels.device import KERNEL_DTYPES, MOST_CHANNELS, find_kernels
from scout_hf.methods.base import PAST_CHUNK_TOKENS
from scout_hf.methods.replays import ReplayPart
from scout_hf.methods.scout.executor import Executor, resident_memory
from scout_hf.methods.scout.executor_captured import CapturedExecutor
from scout_hf.methods.scout.handoff import Flags, Handoff, JobCounts, Mailbox, NoHandoff, make_handoff
from scout_hf.selection import Pick
from scout_hf.step import Step
from scout_hf.stores import TwoTierKV
from scout_hf.stores.mapped_slots import MappedSlots
from scout_hf.stores.streams import Mark

if TYPE_CHECKING:
    from typing_extensions import Self

    from scout_hf.graph_clock import Clock
    from scout_hf.methods.scout.policy import TwoTierScout as Layer

SPARE_BLOCKS = 64
# Host pages per row that captured steps have in advance, so that not each block that they fill asks for one: so many,
# or this part of the context, for which slabs and tables have room anyway.
RESERVED_BLOCKS, RESERVED_PART = 8, 8


class TritonExecutor(Executor):
    """Executor with Triton kernels: residents in a ``MappedSlots``, no host sync in a decode step.

    Attributes
    ----------
    handoff : Handoff
        Hand-over of CPU attention.
    is_chosen : Tensor (batch, kv_heads, blocks) of uint8
        1 for each chosen block.
    pages : Tensor (batch, blocks) of int64, on the device
        Addresses of the host pages.
    recalled : Mark
        The end of the last recall.
    """

    uses = frozenset({"hand_over"})
    recalling = False  # for the main thread: only the stream waits, in attend_device()

    def __init__(self, config: ScoutConfig, kv: TwoTierKV):
        super().__init__(config, kv)
        kernels = find_kernels(config.gpu_kernels, kv.device)
        if kernels is None:
            raise ConfigError(f"there are no Triton kernels for {kv.device}; check TritonExecutor.serves() first")
        self.kernels = kernels
        self.handoff: Handoff = NoHandoff()
        self.is_chosen = torch.zeros((kv.batch, 0, 0), dtype=torch.uint8, device=kv.device)
        self.pages = torch.zeros((kv.batch, 0), dtype=torch.int64, device=kv.device)
        self.recalled = Mark()
        self._awaited = [Mark(), Mark()]  # the last write-back and the last recall that the stream waits for
        self._block_size, self._sinks = kv.block_size, config.blocks(config.sinks)
        self._block_bytes = 2 * kv.block_size * kv.host.head_dim * kv.host.dtype.itemsize

    @classmethod
    def serves(cls, config: ScoutConfig, keys: torch.Tensor) -> bool:
        """Whether the kernels run on the device of ``keys`` and support their dtype, head_dim and host pages."""
        known = keys.dtype in KERNEL_DTYPES and keys.shape[-1] <= MOST_CHANNELS
        return known and cls.runs_on(config, keys.device)

    @classmethod
    def runs_on(cls, config: ScoutConfig, device: torch.device) -> bool:
        """Whether the kernels run on ``device`` and support the host pages."""
        return config.host_dtype is None and find_kernels(config.gpu_kernels, device) is not None

    @property
    def variant(self) -> str:
        return "triton" if isinstance(self.handoff, NoHandoff) else f"triton, {type(self.handoff).__name__}"

    def captured(self, clock: Clock) -> CapturedExecutor:
        return CapturedExecutor(self, clock)

    # -- the parts of a step --------------------------------------------------------------------------------------

    def select(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        layer.state.pick, layer.state.scores, _ = self._choose(layer, step, query, layer.resident)

    def _choose(
        self, layer: Layer, step: Step, query: torch.Tensor, slots: MappedSlots, loading: bool = False
    ) -> tuple[Any, torch.Tensor | None, int]:
        """The choice, scores that rank it if needed, and the largest top-k size of a list."""
        blocks = layer.kv.host.blocks
        scores, count, block_mask = layer.selector.rank(step, query, blocks, lambda: layer.kv.tail()[0], loading)
        most = min(blocks, count if isinstance(count, int) else int(count.max()))
        if isinstance(count, torch.Tensor):
            count = count.to(query.device, non_blocking=True)
        self._mail(layer, step, query, most)
        if min(slots.slot_of.shape[2], self.is_chosen.shape[2]) <= blocks:
            self._cover(slots, blocks + 1)  # + 1: a block may be adopted before the recall
        ordered = scores is not None and (loading or most > slots.slots)
        if scores is None:
            scores = torch.zeros((len(query), layer.kv_heads, blocks), dtype=torch.float32, device=query.device)
        choice = self.choose(layer, slots, scores, count, block_mask)
        return choice, self.order_of(layer, scores, block_mask) if ordered else None, most

    def choose(
        self,
        layer: Layer,
        slots: MappedSlots,
        scores: torch.Tensor,
        count: int | torch.Tensor,
        block_mask: torch.Tensor | None,
        filled: torch.Tensor | None = None,
    ) -> Any:
        """Choose the top-k of the first ``filled`` blocks (by default all); a ``Choice``."""
        mail = self.handoff.mail
        choice = self.kernels.Choice(self.is_chosen, mail.missing, mail.missing_counts, mail.chosen_counts)
        return self.kernels.choose(scores, count, self._sinks, block_mask, slots.slot_of, mail.capacity, filled, choice)

    def order_of(self, layer: Layer, scores: torch.Tensor, block_mask: torch.Tensor | None) -> torch.Tensor:
        """The scores, with infinity for sinks, to rank blocks in :meth:`recall`; changes ``scores``."""
        if block_mask is None:
            scores[:, :, : self._sinks] = torch.inf
            return scores
        return scores.masked_fill_((block_mask & (block_mask.cumsum(1) <= self._sinks))[:, None], torch.inf)

    def _cover(self, slots: MappedSlots, blocks: int) -> None:
        """Enlarge the per-block tensors to at least ``blocks`` blocks."""
        slots.reserve(blocks)
        if self.is_chosen.shape[2] < blocks:
            self.is_chosen = torch.zeros_like(slots.slot_of, dtype=torch.uint8)

    def _mail(self, layer: Layer, step: Step, query: torch.Tensor, capacity: int) -> None:
        """Provide a mailbox for lists of ``capacity`` blocks."""
        if step.counters.history is not None:
            step.counters.fold()  # before the next job adds to the last one's share
        if not self.handoff.serves(query, capacity, step.backend):
            self.handoff.drain()
            device, spare = query.device, max(SPARE_BLOCKS, capacity // 8)
            mail = Mailbox(query, layer.kv_heads, capacity + spare, step.cache.late.word(device))
            made = layer.config.hand_over, mail, self.kernels, step.backend, layer.kv.host, device, layer.layer_idx
            handoff = make_handoff(*made)
            JobCounts(step.counters, layer.layer_idx, handoff)
            self.handoff = handoff

    def submit_cpu(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        layer.state.started = True
        self._await(0, layer.kv.written)  # whose blocks the CPU reads
        padding_mask = None if step.mask is None else step.padding(torch.device("cpu"))
        self.handoff.start(step, query.contiguous(), layer.kv.host, layer.scoring, padding_mask)

    def attend_device(self, layer: Layer, step: Step, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        padding_mask = None if step.mask is None else step.padding(query.device)
        self._await(1, self.recalled)
        layer.state.attended = self._tokens_here(layer, step)
        where = {"first": layer.kv.host.blocks, "lengths": step.length(query.device)}
        return self.attend(layer, step, query, layer.kv.tail_blocks(), where, padding_mask)

    def attend(
        self,
        layer: Layer,
        step: Step,
        query: torch.Tensor,
        tail: tuple[torch.Tensor, torch.Tensor],
        where: dict[str, Any],
        padding_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial outputs and LSEs of tail and residents; ``where`` gives the positions of the tail."""
        spans: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] = [(*tail, where)]
        if layer.resident is not None:
            spans.append((layer.resident.keys, layer.resident.values, {"ids": layer.resident.ids}))
        out, lse, *into = self._partials(step, query, layer.kv_heads, [keys.shape[2] for keys, _, _ in spans])
        for place, (keys, values, where) in zip(into, spans):
            self.kernels.attend_blocks(
                query, keys, values, *layer.scoring, padding_mask=padding_mask, into=place, **where
            )
        return out, lse

    def _partials(self, step: Step, query: torch.Tensor, kv_heads: int, listed: list[int]) -> Any:
        """Partial outputs and LSEs of spans of so many blocks, and views of them for each span.

        All layers of a step use the same, one after the other: the stream runs in order.
        """
        key = "partials", query.shape, query.device, kv_heads, *listed
        found = step.shared.get(key)
        if found is None:
            lists, size = query.shape[0] * kv_heads, self._block_size
            parts = [self.kernels.kv_splits_for(query.device, lists, blocks, size) for blocks in listed]
            shape = (*query.shape[:2], sum(parts), query.shape[3])
            out = torch.empty(shape, dtype=torch.float32, device=query.device)
            lse = torch.empty(shape[:3], dtype=torch.float32, device=query.device)
            found = step.shared[key] = (out, lse, *zip(out.split(parts, dim=2), lse.split(parts, dim=2)))
        return found

    def join_cpu(self, layer: Layer, step: Step, query: torch.Tensor) -> Partial | None:
        share = self.handoff.result(step)
        if step.counters.history is not None:
            step.counters.fold()
        return share

    def attend_again(self, layer: Layer, step: Step, query: torch.Tensor) -> Partial | None:
        self.handoff.counted = False
        try:
            self.submit_cpu(layer, step, query)
            return self.handoff.result(step)
        finally:
            self.handoff.counted = True

    def merge(self, here: tuple[torch.Tensor, torch.Tensor], share: Partial | None, dtype: torch.dtype) -> Partial:
        return Partial(*self.kernels.merge(*here, *(share or ()), dtype=dtype))

    def seen(self, layer: Layer) -> list[Pick]:
        ids, mail = layer.resident.ids, self.handoff.mail
        if ids.is_cuda:
            torch.cuda.current_stream(ids.device).synchronize()
        layer.written.finish()
        used = torch.arange(mail.capacity, dtype=torch.int64, device="cpu") < mail.missing_counts[..., None]
        missing = torch.where(used, mail.missing, 0).long()
        return [Pick(ids.clamp(min=0).long(), ids >= 0), Pick(missing.to(ids.device), used.to(ids.device))]

    def _tokens_here(self, layer: Layer, step: Step) -> float | torch.Tensor:
        """Tokens in tail and slots, mean over rows and KV heads; a tensor if only the device knows it."""
        slots, first = layer.resident, layer.kv.host.length
        if step.mask is None and slots is not None and slots.filled is not None:
            return float(step.tokens - first + slots.filled * layer.config.block_size)
        return step.behind(first, layer.kv.device) + self._tokens_held(layer, step)

    def _tokens_held(self, layer: Layer, step: Step) -> float | torch.Tensor:
        """The same of the slots alone."""
        slots, size = layer.resident, layer.config.block_size
        if slots is None:
            return 0.0
        if step.mask is None:
            return (slots.ids >= 0).sum(dtype=torch.float32) * size / slots.ids[:, :, 0].numel()
        real = step.block_tokens(size, layer.kv.device)
        held = real[:, None].expand(-1, layer.kv_heads, -1).gather(2, slots.ids.clamp(min=0).long())
        return held.masked_fill(slots.ids < 0, 0).sum(dtype=torch.float32) / slots.ids[:, :, 0].numel()

    # -- residents ------------------------------------------------------------------------------------------------

    def new_residents(self, layer: Layer, slots: int) -> MappedSlots:
        host = layer.kv.host
        sizes = (host.batch, layer.kv_heads, slots, host.block_size, host.head_dim)
        with resident_memory(layer, slots):
            return MappedSlots(*sizes, host.dtype, layer.kv.device)

    def load_residents(self, layer: Layer, step: Step, query: torch.Tensor, slots: MappedSlots | None) -> MappedSlots:
        host, slots = layer.kv.host, self.new_residents(layer, layer.slots()) if slots is None else slots
        slots.clear(host.blocks)
        choice, scores, most = self._choose(layer, step, query, slots, loading=True)
        layer.written.before(query.device)
        moves = self.kernels.plan_recall(
            slots.ids, slots.slot_of, choice if scores is None else _best_first(choice, scores)
        )
        self.kernels.copy_blocks(self.pages, moves, slots.keys, slots.values)
        # A row of a padded batch may have fewer blocks.
        slots.loaded(min(slots.slots, most) if step.mask is None else None)
        return slots

    def adopt(self, slots: MappedSlots, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        slots.reserve(first + 1)
        slots.adopted(first)
        self.kernels.adopt_block(first, keys, values, slots.ids, slots.slot_of, slots.keys, slots.values)

    def recall(self, layer: Layer, step: Step, share: float | torch.Tensor) -> None:
        # As in changing_residents(), with less work: this is part of most steps.
        slots, layer.resident = layer.resident, None
        self.recalled = self.swap(layer, step, slots, share, layer.kv.written)
        layer.resident = slots

    def swap(
        self, layer: Layer, step: Step, slots: MappedSlots, share: float | torch.Tensor, after: Mark | None = None
    ) -> Mark:
        """Recall missing blocks if the CPU's share is at least ``share``; returns the end of the copies."""
        slots_at, choice = slots.ids.device, layer.state.pick
        tally = step.counters.recall_tally(layer.layer_idx, slots_at, self._block_bytes)
        if layer.state.scores is not None:
            choice = _best_first(choice, layer.state.scores)
        moves = self.kernels.plan_recall(slots.ids, slots.slot_of, choice, share, tally)
        with step.links.beside("recall", slots_at, *moves, after=after) as mark:
            self.kernels.copy_blocks(self.pages, moves, slots.keys, slots.values)
        slots.recalled(layer.kv.host.blocks)
        return mark

    def recall_tally(self, layer: Layer, step: Step) -> torch.Tensor:
        """The device counter of recalled blocks."""
        return step.counters.recall_tally(layer.layer_idx, layer.kv.device, self._block_bytes)

    def join_recall(self, layer: Layer) -> None:
        self._await(1, self.recalled)

    def _await(self, which: int, mark: Mark) -> None:
        """Make the stream wait for a mark; once, since what it runs later runs in order."""
        if self._awaited[which] is not mark:
            mark.before(self.pages.device)
            self._awaited[which] = mark

    # -- the host's pages -------------------------------------------------------------------------------------------

    def write_back(self, layer: Layer, step: Step | None) -> None:
        first, links = layer.kv.host.blocks, None if step is None else step.links
        layer.kv.write_back(layer.window_blocks, links, in_place=True)
        self._map_pages(layer, first)

    def pages_grew(self, layer: Layer, first: int) -> None:
        self._map_pages(layer, first)

    def _map_pages(self, layer: Layer, first: int) -> None:
        """Copy the addresses of pages from block ``first`` on to the device."""
        layer.kv.host.touch(None)  # kernels read the pages of a file unseen
        addresses, device = layer.kv.host.table.addresses, self.pages.device
        rows, blocks = addresses.shape
        if rows != self.pages.shape[0] or blocks > self.pages.shape[1]:
            first = 0
            self.pages = torch.zeros((rows, blocks + max(SPARE_BLOCKS, blocks // 8)), dtype=torch.int64, device=device)
        new = layer.kv.host.table.pool.seen_by_device(addresses[:, first:]).contiguous()
        if device.type == "cuda":
            new = new.pin_memory()  # a copy from pageable memory would sync
        self.pages[:, first:blocks].copy_(new, non_blocking=True)

    def past_chunks(self, layer: Layer, step: Step, past: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Copy host blocks into two alternating buffers, each chunk while the previous one is attended."""
        kv, size, heads = layer.kv, layer.config.block_size, layer.kv_heads
        whole = min(past, kv.host.length)
        most = min(PAST_CHUNK_TOKENS, whole) // size
        shape = (2, 2, kv.batch, heads, most, size, kv.host.head_dim)
        buffers = torch.empty(shape, dtype=layer.dtype, device=kv.device)

        def bring(number: int) -> Mark:
            first = number * most
            count = min(most, whole // size - first)
            moves = self.kernels.run_of_blocks(kv.batch, heads, first, count, kv.device)
            with step.links.beside("past", kv.device, buffers, *moves, after=layer.written) as mark:
                self.kernels.copy_blocks(self.pages, moves, *buffers[number % 2])
            return mark

        pieces = -(-whole // (most * size)) if most else 0
        coming = bring(0) if pieces else Mark()
        for number in range(pieces):
            here, coming = coming, bring(number + 1) if number + 1 < pieces else Mark()
            here.before(kv.device)
            start = number * most * size
            stop = min(start + most * size, whole)
            keys, values = (part.flatten(2, 3)[:, :, : stop - start] for part in buffers[number % 2])
            yield start, keys, values
        if past > whole:
            yield whole, *kv.read(whole, past)

    # -- changes of the cache -------------------------------------------------------------------------------------

    def drop_job(self, layer: Layer) -> None:
        self.handoff.drain()

    def drain(self, layer: Layer) -> None:
        layer.written.finish()
        self.recalled.finish()

    def pages_changed(self, layer: Layer, rows: bool = False) -> None:
        if rows:
            self._forget_batch()
        self._map_pages(layer, 0)

    def _forget_batch(self) -> None:
        """Drop the buffers whose size depends on the batch."""
        self.handoff, self.is_chosen = NoHandoff(), self.is_chosen.new_zeros((0, 0, 0))

    def fork(self) -> Self:
        twin = copy.copy(self)
        twin._forget_batch()
        twin._awaited = [Mark(), Mark()]
        twin.pages = self.pages.clone()
        return twin

    # -- captured steps -------------------------------------------------------------------------------------------

    def capture_key(self, layer: Layer, step: Step) -> tuple[Any, ...] | None:
        budget, kv, selector = layer.config.sparse_budget, layer.kv, layer.selector
        ready = isinstance(self.handoff, Flags) and not self.handoff.lost
        if not ready or layer.config.mass is not None or (isinstance(budget, float) and budget < 1.0):
            return None
        self._cover(layer.resident, max(selector.table.capacity, kv.host.blocks))
        kept = [kv.buffers()[0], self.is_chosen, layer.resident.slot_of, layer.resident.keys, self.pages]
        kept += [] if selector.dense else [selector.table.all_codes()]
        count = selector.count(step, kv.host.blocks)
        listed = kv.host.blocks if count is None else int(count)
        if not self.handoff.serves(self.handoff.mail.query, listed, step.backend):
            return None
        # The hand-over itself: while the key lives, no other object can be taken for it.
        return (count, self.handoff, *((part.data_ptr(), part.shape) for part in kept), layer.scoring)

    def prepare_replays(self, layer: Layer, step: Step, padding_mask: torch.Tensor | None) -> ReplayPart:
        if not isinstance(self.handoff, Flags):
            raise CacheStateError("replays were prepared without a capture key")
        # Allocated before a capture: an allocation within it would reset the counter in every replay.
        self.recall_tally(layer, step)
        self._await(0, layer.written)  # whose blocks the CPU reads
        self.join_recall(layer)
        self._reserve_pages(layer)
        job = self.handoff.job
        job.describe(layer.kv.host, *layer.scoring, padding_mask)
        job.counted = True
        slots = layer.resident
        known = step.mask is None and slots.filled is not None
        held = float(slots.filled * layer.config.block_size) if known else slots.ids
        return ReplayPart(layer.layer_idx, job, held)

    def _reserve_pages(self, layer: Layer) -> None:
        host = layer.kv.host
        count = min(max(RESERVED_BLOCKS, host.blocks // RESERVED_PART), self.pages.shape[1] - host.blocks)
        if host.reserved == 0 < count and not host.table.pool.watched:
            host.reserve(count)
            self._map_pages(layer, host.blocks)

    def after_replay(self, layer: Layer) -> None:
        layer.resident.recalled(layer.kv.host.blocks)

    def can_fill(self, layer: Layer) -> bool:
        host = layer.kv.host
        return host.reserved > 0 and host.blocks < layer.resident.slot_of.shape[2]

    def filled(self, layer: Layer, mark: Mark) -> None:
        first = layer.kv.host.blocks
        # The same stream goes on: it need not wait.
        layer.kv.written = self._awaited[0] = mark
        layer.kv.filled()
        layer.resident.adopted(first)

    def abort_replay(self, layer: Layer) -> None:
        self.drop_job(layer)
        self.handoff = NoHandoff()


def _best_first(choice: Any, scores: torch.Tensor) -> Any:
    """The same ``Choice`` with the missing blocks of every list sorted by ``scores``, best first."""
    missing, counts = (part.to(scores.device, non_blocking=True) for part in (choice.missing, choice.missing_counts))
    place = torch.arange(missing.shape[2], dtype=torch.int64, device=scores.device)
    used = place < counts[..., None]
    missing = torch.where(used, missing, 0)
    worth = scores.gather(2, missing.long()).masked_fill(~used, -torch.inf)
    order = worth.argsort(dim=2, descending=True, stable=True)
    return choice._replace(missing=missing.gather(2, order))
