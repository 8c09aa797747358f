"""Scout on two tiers: device and CPU attend together, the CPU's share is chosen one layer ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from scout_hf.config import ScoutConfig
from scout_hf.fusion import Partial, fuse
from scout_hf.kernels.attend import attend
from scout_hf.methods.base import Method
from scout_hf.methods.scout.query_gate import QueryGate
from scout_hf.recall import RecallIntervals
from scout_hf.selection import Pick, Selector, pack_lists
from scout_hf.step import Step
from scout_hf.stores import ResidentSlots, TwoTierKV

DEFAULT_RESIDENT_TOKENS = 2048


class TwoTierScout(Method):
    """Two tiers of one layer (Algorithm 1 of the paper), with torch's operations on any device.

    ``ahead`` (in the layer before) picks blocks with the predicted query and, where that query is trusted, starts the
    CPU on those that are not resident; ``attend`` adds all residents and the tail with the real query; ``settle``
    writes back and recalls.
    """

    name = "scout"

    def __init__(self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor):
        super().__init__(config, layer_idx, keys)
        batch, heads, _, dim = keys.shape
        self.kv = TwoTierKV(batch, heads, dim, config.block_size, keys.dtype, keys.device, config.host_dtype)
        self.selector = Selector(config, layer_idx, keys)
        self.resident: ResidentSlots | None = None
        self.gate = QueryGate(config.cpu_query)
        self._window_blocks = config.blocks(config.window)
        self._steps_since_recall = 0
        self._forget()

    # -- join points --------------------------------------------------------------------------------------------

    @property
    def wants_ahead(self) -> bool:
        ready = self.resident is not None and self.scoring is not None and self.kv.host.blocks > 0
        return ready and self.config.layer_ahead

    def ahead(self, step: Step, query: torch.Tensor) -> None:
        query = self._predicted = query.to(self.dtype)
        self._select(step, query)
        self._guessed, self._checks = self._ask_trust(step)
        if self._guessed:
            self._start_cpu(step, query)

    def attend(self, step: Step, query: torch.Tensor) -> Partial:
        if self.kv.host.blocks and self.resident is None:
            self._choose_residents(step, query)
        with step.counters.timed(self.layer_idx, "join"):
            self._join_recall()
        self._attended = 0.0
        if self.resident is not None:
            if self._pick is None:
                self._select(step, query)
            if not self._started:
                self._start_cpu(step, query)
        here = self._attend_here(step, query)
        share = self._join_cpu(step, query) if self._started else None
        self._tally(step, query)
        result = self._merge(here, share)
        if self._checks and share is not None:
            self.gate.judge(result, self._merge(here, self._attend_on_cpu(step, self._predicted)))
        if step.monitor is not None:
            step.monitor.watch(step, self, query, result, self._seen, self._guessed)
        return result

    def observe(self, step: Step, query: torch.Tensor) -> None:
        self.selector.observe(query, self.kv_heads, self.scoring.scale, step.mask)

    def settle(self, step: Step) -> None:
        self._write_back(step)
        if self._pick is not None:
            self._recall_if_due(step)
        self._forget()
        if self.resident is not None and self._slots() > 1.25 * self.resident.slots:
            # A share budget has outgrown its slots: the next attention chooses residents anew.
            self._join_recall()
            self.resident = None

    def end_step(self) -> None:
        if self._pick is not None:
            self._drop_job()

    def flush(self) -> None:
        self.drain()
        self._write_back(None)

    def prefilled(self, step: Step, query: torch.Tensor) -> None:
        if self.kv.host.blocks and step.queries >= self.config.block_size:
            self._join_recall()
            self._choose_residents(step, query)

    # -- structure ----------------------------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        super().crop(length)
        self._fit_to_host()

    def mark(self) -> Any:
        return self.kv.mark()

    def rollback(self, mark: Any) -> None:
        self.drain()
        self.kv.rollback(mark)
        self._fit_to_host()

    def _fit_to_host(self) -> None:
        self.selector.crop(self.kv.host.blocks)
        with self._changing_residents() as resident:
            if resident is not None:
                resident.crop(self.kv.host.blocks)

    @contextlib.contextmanager
    def _changing_residents(self) -> Iterator[Any]:
        """The residents, gone if the block fails: some slot may name what it does not hold, and all are chosen anew."""
        resident, self.resident = self.resident, None
        yield resident
        self.resident = resident

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        self.selector.select_rows(rows)
        if self.resident is not None:
            self.resident.select_rows(rows)

    def fork(self) -> TwoTierScout:
        twin = super().fork()
        twin.selector = self.selector.fork()
        twin.resident = self.resident and self.resident.fork()
        twin.gate = self.gate.fork()
        return twin

    def drain(self) -> None:
        self._drop_job()
        if self._recall is not None:
            if not self._recall.drain():
                self.resident = None
            self._recall = None

    def slabs(self) -> list[torch.Tensor]:
        return self.kv.host.table.pool.slabs

    def tier_bytes(self) -> dict[str, int]:
        resident = self.resident  # read once: another thread may be decoding
        device = self.kv.device_bytes + (resident.used_bytes if resident else 0)
        return {"host": self.kv.host.used_bytes, "device": device, "digests": self.selector.table.used_bytes}

    # -- the parts of a step ------------------------------------------------------------------------------------

    def _select(self, step: Step, query: torch.Tensor) -> None:
        blocks = self.kv.host.blocks
        self._pick = self.selector.pick(step, query, blocks, self.kv_heads)
        usable = self._pick.usable_or_all()
        self._missing = usable & ~self.resident.holds(self._pick.ids, blocks)

    def _ask_trust(self, step: Step) -> tuple[bool, bool]:
        """Whether the CPU may start with the predicted query, and whether to compare it with the real one."""
        return self.gate.in_prediction(), self.gate.checking

    def _start_cpu(self, step: Step, query: torch.Tensor) -> None:
        job = self._job(step, query)
        self._started, self._share_blocks = True, int(job[2].counts.sum())
        if self._share_blocks:
            ticket = step.backend.start(*job)
            read = self._share_blocks * 2 * self.kv.host.block_size * self.kv.host.head_dim * self.dtype.itemsize
            self._ticket = step.links.limit_cpu(ticket, read, self.config.cpu_gbps)

    def _job(self, step: Step, query: torch.Tensor) -> tuple:
        lists = pack_lists(self._pick.ids, self._missing)
        exists = None if step.mask is None else step.padding(lists.ids.device)
        return query.detach().cpu(), self.kv.host, lists, *self.scoring, exists

    def _join_cpu(self, step: Step, query: torch.Tensor) -> Partial | None:
        """The CPU's share on the device, None where there is none."""
        if self._ticket is None:
            return None
        with step.counters.timed(self.layer_idx, "join"):
            share = self._ticket.wait()
        # Only now: after an interrupt, a rollback must find the job to wait for it.
        self._ticket = None
        self._attended += share.tokens / (query.shape[0] * self.kv_heads)
        return Partial(*(t.to(query.device) for t in share.partial))

    def _attend_on_cpu(self, step: Step, query: torch.Tensor) -> Partial:
        """The CPU's share once more, with another query."""
        return Partial(*(t.to(query.device) for t in step.backend.attend_blocks(*self._job(step, query)).partial))

    def _attend_here(self, step: Step, query: torch.Tensor) -> list[Partial]:
        """What the device holds: residents and tail."""
        tail = self._attend_tail(step, query)
        return [tail] if self.resident is None else [self._attend_residents(step, query), tail]

    def _merge(self, here: list[Partial], share: Partial | None) -> Partial:
        return fuse(here if share is None else [*here, share])

    def _attend_residents(self, step: Step, query: torch.Tensor) -> Partial:
        keys, values = self.resident.content()
        allowed, size = None, self.config.block_size
        if step.mask is not None or self.resident.gaps:
            ids = self.resident.ids[:, :, : self.resident.filled]
            allowed = (ids >= 0).unsqueeze(-1).expand(*ids.shape, size)
            if step.mask is not None:
                rows = torch.arange(len(ids), dtype=torch.int64, device=ids.device)[:, None, None]
                allowed = allowed & step.token_mask(size, ids.device)[rows, ids.clamp(min=0)]
            allowed = allowed.flatten(2).unsqueeze(2)
        return self._attend_tokens(query, keys, values, allowed)

    def _attend_tail(self, step: Step, query: torch.Tensor) -> Partial:
        keys, values = self.kv.tail()
        allowed = None if step.mask is None else step.padding(query.device)[:, None, None, self.kv.host.length :]
        return self._attend_tokens(query, keys, values, allowed)

    def _attend_tokens(self, query, keys, values, allowed) -> Partial:
        tokens = keys.shape[2] if allowed is None else allowed.sum(dtype=torch.float32) / allowed.shape[:2].numel()
        self._attended = self._attended + tokens
        return attend(query, keys, values, *self.scoring, allowed)

    def _seen(self) -> list[Pick]:
        """The blocks that this step attended: all residents, and what it chose besides."""
        if self.resident is None:
            return []
        ids = self.resident.ids[:, :, : self.resident.filled]
        return [Pick(ids, ids >= 0), Pick(self._pick.ids, self._missing)]

    def _write_back(self, step: Step) -> None:
        full = self.kv.full_blocks(self._window_blocks)
        if full is None:
            return
        self._join_recall()  # its thread reads the host's table
        first, count = self.kv.host.blocks, full[0].shape[2] // self.config.block_size
        exists = None
        if step is not None and step.mask is not None:
            exists = step.token_mask(self.config.block_size, self.kv.device)[:, first : first + count]

        def past() -> tuple[torch.Tensor, torch.Tensor | None]:
            marks = None if exists is None else step.token_mask(self.config.block_size, self.kv.device)[:, :first]
            return self._past_keys(first * self.config.block_size), marks

        self.selector.extend(full[0], exists, past)
        if self.resident is not None and count == 1:
            self._adopt(first, *full)
        self._store(step)

    def _adopt(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        with self._changing_residents() as resident:
            resident.adopt(first, keys, values)

    def _past_keys(self, tokens: int) -> torch.Tensor:
        return self.kv.host.read(0, tokens)[0]

    def _store(self, step: Step) -> None:
        self.kv.write_back(self._window_blocks)

    def _choose_residents(self, step: Step, query: torch.Tensor) -> None:
        host, resident = self.kv.host, self.resident
        self.resident = None
        if resident is None:
            batch, _, _, dim = query.shape
            like = (host.dtype, query.device)
            resident = ResidentSlots(batch, self.kv_heads, self._slots(), self.config.block_size, dim, *like)
        pick = self.selector.pick(step, query, host.blocks, self.kv_heads)
        resident.load(pick.ids, pick.usable_or_all(), host)
        self.resident = resident
        self._steps_since_recall = 0

    def _slots(self) -> int:
        tokens = self.config.resident or self.config.budget or DEFAULT_RESIDENT_TOKENS
        if isinstance(tokens, float):
            tokens = max(self.config.block_size, int(tokens * self.kv.length))
        return self.config.blocks(tokens)

    # -- recall -------------------------------------------------------------------------------------------------

    def _recall_if_due(self, step: Step) -> None:
        if self._recall_due(step):
            self._start_recall(step)

    def _recall_due(self, step: Step) -> bool:
        self._steps_since_recall += 1
        rule = self.config.recall
        if rule is None or self._share_blocks is None:
            return False
        if isinstance(rule, float):
            return self._share_blocks >= self._threshold(step, rule) * self._selected_blocks()
        return self._interval_is_over(rule)

    def _threshold(self, step: Step, beta: float) -> float:
        """The CPU's share from which on to recall: lower and higher than ``beta`` by turns, layer by layer.

        Layers that drift alike would all recall in the same steps, and wait for a link that is idle in the others.
        """
        # Rounded as on a device, where a captured step compares in float32.
        return float(np.float32(beta * (0.75 if (step.tokens + self.layer_idx) % 2 else 1.25)))

    def _interval_is_over(self, rule: int | RecallIntervals) -> bool:
        interval = rule.intervals[self.layer_idx] if isinstance(rule, RecallIntervals) else rule
        # Layers start at different phases, so that their transfers do not bunch up in one step.
        return interval > 0 and (self._steps_since_recall + self.layer_idx) % interval == 0

    def _selected_blocks(self) -> int:
        """Chosen blocks over all rows and heads; entries that pad out short rows do not count."""
        return self._pick.ids.numel() if self._pick.usable is None else int(self._pick.usable.sum())

    def _start_recall(self, step: Step) -> None:
        with self._changing_residents() as resident:
            plan = resident.plan_recall(self._pick.ids, self._pick.usable_or_all(), self.kv.host.blocks)
            if plan is not None:
                places = plan.addresses(self.kv.host)
                held = (resident.keys, resident.values, self.kv.host.memory())
                self._recall = places and step.backend.copy(*places, keep=held)
                if self._recall is None:
                    self._recall = step.movers.submit(plan.run, self.kv.host)
                self._recall = step.links.limit(self._recall, plan.moved_bytes, self.config.link_gbps)
                step.counters.recalled(self.layer_idx, plan.blocks, plan.moved_bytes)

    def _join_recall(self) -> None:
        if self._recall is not None:
            with self._changing_residents():
                self._recall.wait()
                # Only now: after an interrupt, a rollback must find the job to wait for it.
                self._recall = None

    # -- bookkeeping --------------------------------------------------------------------------------------------

    _recall = None

    def _drop_job(self) -> None:
        if self._ticket is not None:
            self._ticket.drain()
        self._forget()

    def _forget(self) -> None:
        self._pick: Pick | None = None
        self._missing = self._ticket = self._predicted = self._share_blocks = None
        self._attended, self._started, self._guessed, self._checks = 0.0, False, False, False

    def _tally(self, step: Step, query: torch.Tensor) -> None:
        step.counters.attended(self.layer_idx, step.context(), self._attended)
        if self._share_blocks is not None:
            step.counters.cpu_share(self.layer_idx, self._share_blocks, self._selected_blocks())
        if self._predicted is not None:
            step.counters.predicted(self.layer_idx, self._predicted, query)
