"""Scout with the device's half in Triton kernels: a decode step asks the device for nothing, it only launches.

The rules are those of :class:`TwoTierScout`; what differs is where numbers live. Chosen blocks, slots and their maps
stay on the device, lists and queries go to the CPU through a :class:`Mailbox`, write-back and recall run on streams of
their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from scout_hf.config import ScoutConfig
from scout_hf.fusion import Partial
from scout_hf.kernels.device import KERNEL_DTYPES, MOST_CHANNELS, find_kernels
from scout_hf.methods.base import PAST_CHUNK_TOKENS
from scout_hf.methods.scout.handoff import Flags, Handoff, Mailbox, make_handoff
from scout_hf.methods.scout.policy import TwoTierScout
from scout_hf.methods.scout.query_gate import QueryGate
from scout_hf.selection import Pick
from scout_hf.step import Step
from scout_hf.stores.link import Mark
from scout_hf.stores.slots import MappedSlots

SPARE_BLOCKS = 64


class TritonScout(TwoTierScout):
    """Two tiers of one layer, without a wait for the device in a decode step."""

    resident: MappedSlots | None

    def __init__(self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor):
        super().__init__(config, layer_idx, keys)
        self._kernels = find_kernels(config.gpu_kernels, keys.device)
        if config.hand_over == "graph" and config.cpu_query == "auto":
            self.gate = QueryGate("real")  # no step that is run again can compare
        self.handoff: Handoff | None = None
        self._wanted: torch.Tensor | None = None
        # Addresses of the host's pages, on the device.
        self._pages = torch.zeros((self.kv.batch, 0), dtype=torch.int64, device=keys.device)
        self._written, self._recalled = Mark(), Mark()

    @classmethod
    def serves(cls, config: ScoutConfig, keys: torch.Tensor) -> bool:
        """Whether the kernels know such keys, and pages that a device can read."""
        return config.host_dtype is None and keys.dtype in KERNEL_DTYPES and keys.shape[-1] <= MOST_CHANNELS

    # -- structure ----------------------------------------------------------------------------------------------

    def rollback(self, mark: Any) -> None:
        super().rollback(mark)
        self._map_pages(0)

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        self.handoff = self._wanted = None  # of the size of the batch before
        self._map_pages(0)

    def fork(self) -> TritonScout:
        twin = super().fork()
        twin.handoff, twin._wanted, twin._pages = None, None, self._pages.clone()
        return twin

    def drain(self) -> None:
        super().drain()
        self._written.finish()
        self._recalled.finish()

    def read_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._written.finish()
        return super().read_all()

    def past_chunks(self, step: Step, past: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """What is on the host comes over the link while the piece before is attended, into two buffers in turn."""
        size, whole = self.config.block_size, min(past, self.kv.host.length)
        most = min(PAST_CHUNK_TOKENS, whole) // size
        shape = (2, 2, self.batch, self.kv_heads, most, size, self.kv.host.head_dim)
        buffers = torch.empty(shape, dtype=self.dtype, device=self.kv.device)

        def bring(number: int) -> Mark:
            first = number * most
            count = min(most, whole // size - first)
            moves = self._kernels.run_of_blocks(self.batch, self.kv_heads, first, count, self.kv.device)
            with step.links.beside("past", self.kv.device, buffers, *moves, after=self._written) as mark:
                self._kernels.copy_blocks(self._pages, moves, *buffers[number % 2])
            return mark

        pieces = -(-whole // (most * size)) if most else 0
        coming = bring(0) if pieces else None
        for number in range(pieces):
            here, coming = coming, bring(number + 1) if number + 1 < pieces else None
            here.before(self.kv.device)
            start = number * most * size
            stop = min(start + most * size, whole)
            keys, values = (part.flatten(2, 3)[:, :, : stop - start] for part in buffers[number % 2])
            yield start, keys, values
        if past > whole:
            yield whole, *self.kv.read(whole, past)

    # -- the parts of a step ------------------------------------------------------------------------------------

    def append(self, keys: torch.Tensor, values: torch.Tensor, step: Step | None = None) -> None:
        if step is None or step.clock is None:
            return super().append(keys, values, step)
        clock = step.clock
        self._kernels.append_token(keys, values, *self.kv.room(), clock.length, clock.blocks, self.config.block_size)

    def _select(self, step: Step, query: torch.Tensor) -> None:
        if step.clock is not None:
            return self._select_by_clock(step, query)
        blocks = self.kv.host.blocks
        scores, count, exists = self.selector.rank(step, query, blocks)
        if scores is None:
            scores = torch.zeros((query.shape[0], self.kv_heads, blocks), dtype=torch.float32, device=query.device)
        self._most = min(blocks, count if isinstance(count, int) else int(count.max()))
        if isinstance(count, torch.Tensor):
            count = count.to(query.device, non_blocking=True)
        self._mail(step, query, self._most)
        self._make_room(blocks + 1)  # a block that is adopted must not outgrow what a recall looks at
        self._choose(scores, count, exists)

    def _select_by_clock(self, step: Step, query: torch.Tensor) -> None:
        """Over the whole buffers, of which only the device knows how much is filled."""
        clock, blocks = step.clock, self.kv.host.blocks
        count, exists = self.selector.count(step, blocks), None
        if count is None:
            room = self._wanted.shape[2]
            scores = torch.zeros((query.shape[0], self.kv_heads, room), dtype=torch.float32, device=query.device)
            count = self.handoff.mail.room
        else:
            scores = self.selector.scores(step, query, self.selector.table.all_codes(), clock.blocks)
        if step.mask is not None:
            exists = clock.block_exists(self.config.block_size, scores.shape[2])
        self._choose(scores, count, exists, clock.blocks)

    def _choose(self, scores: torch.Tensor, count: int | torch.Tensor, exists, filled=None) -> None:
        mail, sinks = self.handoff.mail, self.config.blocks(self.config.sinks)
        choice = self._kernels.Choice(self._wanted, mail.missing, mail.missing_counts, mail.chosen_counts)
        slots = self.resident.slot_of
        self._pick = self._kernels.choose(scores, count, sinks, exists, slots, mail.room, filled, choice)

    def _make_room(self, blocks: int) -> None:
        """Let everything that is kept per block cover that many."""
        self.resident.make_room(blocks)
        if self._wanted is None or self._wanted.shape[2] < blocks:
            self._wanted = torch.zeros_like(self.resident.slot_of, dtype=torch.uint8)

    def _mail(self, step: Step, query: torch.Tensor, room: int) -> Mailbox:
        """The mailbox, with what the step before left in it taken out."""
        self._tally_share(step)
        if self.handoff is None or self.handoff.lost or not self.handoff.mail.fits(query, room):
            if self.handoff is not None:
                self.handoff.drain()
            mail = Mailbox(query, self.kv_heads, room + max(SPARE_BLOCKS, room // 8))
            wanted, device = self.config.hand_over, query.device
            self.handoff = make_handoff(wanted, mail, self._kernels, step.backend, self.kv.host, device)
        return self.handoff.mail

    def _ask_trust(self, step: Step) -> tuple[bool, bool]:
        if step.clock is None:
            return super()._ask_trust(step)
        return self.config.cpu_query == "predicted", False

    def _job(self, step: Step, exists: torch.Tensor | None) -> tuple:
        return self.kv.host, *self.scoring, exists

    def _start_cpu(self, step: Step, query: torch.Tensor) -> None:
        self._started = True
        if step.clock is not None:
            self.handoff.post(query.contiguous())
            return
        # The CPU reads what the last write-back has brought.
        self._written.before(query.device)
        exists = None if step.mask is None else step.padding(torch.device("cpu"))
        self.handoff.start(step, query.contiguous(), self._job(step, exists))

    def _join_cpu(self, step: Step, query: torch.Tensor) -> Partial | None:
        with step.counters.timed(self.layer_idx, "join"):
            share = self.handoff.result(step)
        if step.clock is None:
            self._tally_share(step)
        return None if share is None else Partial(*share)

    def _attend_on_cpu(self, step: Step, query: torch.Tensor) -> Partial | None:
        self._start_cpu(step, query)
        share = self.handoff.result(step)
        self.handoff.uncounted()
        return None if share is None else Partial(*share)

    def _attend_here(self, step: Step, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clock, exists = step.clock, None
        if clock is None:
            exists = None if step.mask is None else step.padding(query.device)
            where = {"first": self.kv.host.blocks, "lengths": step.length(query.device)}
            spans = [(*self.kv.tail_blocks(), where)]
            self._attended = self._attended + self._tokens_here(step)
        else:
            where = {"first": clock.blocks, "lengths": clock.length}
            spans = [(*(part.unflatten(2, (-1, self.config.block_size)) for part in self.kv.room()), where)]
            exists = clock.exists
        if self.resident is not None:
            spans.append((self.resident.keys, self.resident.values, {"ids": self.resident.ids}))
        lists, size = query.shape[0] * self.kv_heads, self.config.block_size
        parts = [self._kernels.parts_for(query.device, lists, keys.shape[2], size) for keys, _, _ in spans]
        out = torch.empty((*query.shape[:2], sum(parts), query.shape[3]), dtype=torch.float32, device=query.device)
        lse, first = torch.empty(out.shape[:3], dtype=torch.float32, device=query.device), 0
        for count, (keys, values, where) in zip(parts, spans):
            into = out[:, :, first : first + count], lse[:, :, first : first + count]
            self._kernels.attend_blocks(query, keys, values, *self.scoring, exists=exists, into=into, **where)
            first += count
        return out, lse

    def _tokens_here(self, step: Step) -> float | torch.Tensor:
        """Tokens in tail and slots, mean over rows and heads; a number where all rows are alike."""
        slots, size = self.resident, self.config.block_size
        if step.mask is None:
            tail = self.kv.length - self.kv.host.length
            if slots is None or slots.filled is not None:
                return tail + (0 if slots is None else slots.filled * size)
            return tail + (slots.ids >= 0).sum(dtype=torch.float32) * size / slots.ids[:, :, 0].numel()
        real = step.block_tokens(size, self.kv.device)
        tail = real[:, self.kv.host.blocks :].sum(dtype=torch.float32) / self.batch
        if slots is None:
            return tail
        held = real[:, None].expand(-1, self.kv_heads, -1).gather(2, slots.ids.clamp(min=0).long())
        return tail + held.masked_fill(slots.ids < 0, 0).sum(dtype=torch.float32) / slots.ids[:, :, 0].numel()

    def _merge(self, here: tuple[torch.Tensor, torch.Tensor], share: Partial | None) -> Partial:
        return Partial(*self._kernels.merge(*here, *(share or ())))

    def _seen(self) -> list[Pick]:
        if self.resident is None:
            return []
        ids, mail = self.resident.ids, self.handoff.mail
        if ids.is_cuda:
            torch.cuda.current_stream(ids.device).synchronize()
        self._written.finish()
        used = torch.arange(mail.room, dtype=torch.int64, device="cpu") < mail.missing_counts[..., None]
        missing = torch.where(used, mail.missing, 0).long()
        return [Pick(ids.clamp(min=0).long(), ids >= 0), Pick(missing.to(ids.device), used.to(ids.device))]

    # -- steps that are captured once and run many times, see scout_hf.graph ---------------------------------------

    def captures(self, step: Step) -> tuple | None:
        """What a captured step of this layer takes for given, and is void without; None if it cannot be captured."""
        ready = self.resident is not None and self.scoring is not None and isinstance(self.handoff, Flags)
        ready = ready and not self.handoff.lost
        budget = self.config.budget
        if not ready or isinstance(budget, float) and budget < 1.0:
            return None
        self._make_room(max(self.selector.table.room, self.kv.host.blocks))
        kept = (self.kv.room()[0], self._wanted, self.resident.slot_of, self.resident.keys, self._pages)
        count = self.selector.count(step, self.kv.host.blocks)
        room = self.handoff.mail.room
        fits = (self.kv.host.blocks if count is None else count) <= room
        codes = 0 if self.selector.dense else self.selector.table.all_codes().data_ptr()
        places = tuple(part.data_ptr() for part in kept)
        return (count, codes, id(self.handoff), *places, self.scoring) if fits else None

    def before_run(self, step: Step, exists: torch.Tensor | None) -> float:
        """On the host, before a captured step runs: the CPU's share is expected. The share from which on to recall."""
        self.handoff.check()
        self._tally_share(step)
        self._recall_tally(step)  # made before a capture, which would make it anew in every run
        self._written.before(self._pages.device)
        self._recalled.before(self._pages.device)
        self._recalled = Mark()
        self.handoff.expect(step, self._job(step, exists))
        self._steps_since_recall += 1
        share = self._share_for_recall(step)
        return 2.0 if share is None else share  # no share is that large

    def after_run(self, step: Step) -> None:
        """On the host, behind a captured step: count what it did, bring full blocks to the host.

        A block so new takes an empty slot after the step's recall, in a plain step before it.
        """
        self.kv.grew(1)
        self.resident.recalled(self.kv.host.blocks)
        step.counters.attended(self.layer_idx, step.context(), self._tokens_here(step))
        self._write_back(step)
        self._forget()

    def abandon_run(self) -> None:
        """The step that was expected will not run."""
        self.handoff.drain()
        self.handoff = None
        self._forget()

    # -- write-back and recall ----------------------------------------------------------------------------------

    def _adopt(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        with self._changing_residents() as slots:
            slots.make_room(first + 1)
            slots.adopted(first)
            self._kernels.adopt_block(first, keys, values, slots.ids, slots.slot_of, slots.keys, slots.values)

    def _past_keys(self, tokens: int) -> torch.Tensor:
        self._written.finish()
        return super()._past_keys(tokens)

    def _store(self, step: Step) -> None:
        first = self.kv.host.blocks
        links = None if step is None else step.links
        self._written = self.kv.write_back(self._window_blocks, links, in_place=True)
        self._map_pages(first)

    def _map_pages(self, first: int) -> None:
        """Bring the addresses of pages from block ``first`` on to the device."""
        addresses, device = self.kv.host.table.addresses, self._pages.device
        rows, blocks = addresses.shape
        if rows != self._pages.shape[0] or blocks > self._pages.shape[1]:
            first = 0
            self._pages = torch.zeros((rows, blocks + max(SPARE_BLOCKS, blocks // 8)), dtype=torch.int64, device=device)
        new = addresses[:, first:].contiguous()
        if device.type == "cuda":
            new = new.pin_memory()  # else the copy would wait for the device
        self._pages[:, first:blocks].copy_(new, non_blocking=True)

    def _choose_residents(self, step: Step, query: torch.Tensor) -> None:
        host, rows = self.kv.host, query.shape[0]
        if self.resident is None:
            sizes = (self._slots(), self.config.block_size, query.shape[3])
            self.resident = MappedSlots(rows, self.kv_heads, *sizes, host.dtype, query.device)
        try:
            slots = self.resident
            slots.clear(host.blocks)
            self._select(step, query)
            self._written.before(query.device)
            moves = self._kernels.plan_recall(slots.ids, slots.slot_of, self._pick)
            self._kernels.copy_blocks(self._pages, moves, slots.keys, slots.values)
        except BaseException:
            self.resident = None  # its maps tell of data that may not have come
            raise
        # A row of a padded batch may have fewer blocks to offer.
        slots.filled = min(slots.slots, self._most) if step.mask is None else None
        self._steps_since_recall, self._pick = 0, None

    def _recall_if_due(self, step: Step) -> None:
        rule, slots = self.config.recall, self.resident
        if step.clock is None:
            self._steps_since_recall += 1
            share = self._share_for_recall(step)
        elif rule is not None:
            share = step.clock.shares[self.layer_idx : self.layer_idx + 1]
        if rule is None or not self._started or (step.clock is None and share is None):
            return
        tally = self._recall_tally(step)
        with self._changing_residents():
            moves = self._kernels.plan_recall(slots.ids, slots.slot_of, self._pick, share, tally)
            # What was written before a captured step is waited for before it.
            after = self._written if step.clock is None else None
            with step.links.beside("recall", slots.ids.device, *moves, after=after) as mark:
                self._kernels.copy_blocks(self._pages, moves, slots.keys, slots.values)
            if step.clock is None:
                self._recalled = mark  # a captured step ends with its copies
            slots.recalled(self.kv.host.blocks)

    def _recall_tally(self, step: Step) -> torch.Tensor:
        slots = self.resident
        return step.counters.recall_tally(self.layer_idx, slots.ids.device, 2 * slots.keys[0, 0, 0].nbytes)

    def _share_for_recall(self, step: Step) -> float | None:
        """The CPU's share from which on the layer recalls in this step; None if it does not at all."""
        rule = self.config.recall
        if isinstance(rule, float):
            return self._threshold(step, rule)
        if rule is None:
            return None
        return 0.0 if self._interval_is_over(rule) else None

    def _join_recall(self) -> None:
        self._recalled.before(self._pages.device)

    # -- bookkeeping --------------------------------------------------------------------------------------------

    _most = 0

    def _drop_job(self) -> None:
        if self.handoff is not None:
            self.handoff.drain()
        super()._drop_job()

    def _tally(self, step: Step, query: torch.Tensor) -> None:
        if step.clock is None:
            super()._tally(step, query)

    def _tally_share(self, step: Step) -> None:
        """Count the share of the last step, as soon as the CPU has told of it."""
        tokens = None if self.handoff is None else self.handoff.finished()
        if tokens is not None:
            mail = self.handoff.mail
            step.counters.add("attended", self.layer_idx, tokens / mail.missing_counts.numel())
            shares = (int(counts.sum()) for counts in (mail.missing_counts, mail.chosen_counts))
            step.counters.cpu_share(self.layer_idx, *shares)
