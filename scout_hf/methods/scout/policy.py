"""Two-tier Scout: what is attended where and when. The executor does it on the device."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from scout_hf.config import ScoutConfig
from scout_hf.fusion import Partial
from scout_hf.methods.base import Method
from scout_hf.methods.offloading import OFFLOADING, OffloadingMethod
from scout_hf.methods.replays import ReplayPart
from scout_hf.methods.scout.executor import Executor, StepState, resident_memory
from scout_hf.methods.scout.executor_torch import TorchExecutor
from scout_hf.methods.scout.query_gate import QueryGate
from scout_hf.methods.scout.recall_policy import RecallPolicy
from scout_hf.selection import LentSelector, Pick, Selector
from scout_hf.step import Role, Step
from scout_hf.stores.state import State, count_in, maybe_count_in, state_in

if TYPE_CHECKING:
    from typing_extensions import Self

    from scout_hf.graph_clock import Clock, Fill
    from scout_hf.stores.streams import Mark

DEFAULT_RESIDENT_TOKENS = 2048
SPARE_BLOCKS = 64
# More slots than blocks are refused in a saved session.
MOST_SPARE_SLOTS = 1 << 16
NO_SHARE = 2.0  # above any share of the CPU: no recall


class TwoTierScout(OffloadingMethod):
    """Two tiers of one layer (ScoutAttention, Algorithm 1).

    ``ahead`` (during the previous layer) selects blocks with the predicted query and, if its prediction is accurate,
    starts CPU attention over those that are not resident. ``attend`` adds residents and tail with the real query.
    ``settle`` writes back and recalls.

    Parameters
    ----------
    config, layer_idx, keys
        As for ``Method``.
    executor : type of Executor
        Implements the device's part.

    Attributes
    ----------
    resident : ResidentSlots, MappedSlots or None
        Blocks on the device; None before they are loaded.
    state : StepState
        State of the current step.
    """

    name = "scout"
    blockwise = True
    uses = OFFLOADING | Selector.uses | {"host_dtype", "monitor", "layer_ahead", "cpu_query", "recall", "resident"}

    def __init__(
        self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor, executor: type[Executor] = TorchExecutor
    ):
        super().__init__(config, layer_idx, keys)
        self.selector = Selector(config, layer_idx, keys)
        self.executor = executor(config, self.kv)
        self.gate = QueryGate(config.cpu_query)
        self.recall_policy = RecallPolicy(config.recall, layer_idx)
        self.resident: Any = None
        self._resident_tokens = config.resident or config.sparse_budget or DEFAULT_RESIDENT_TOKENS
        self._by_share = isinstance(self._resident_tokens, float)
        self.state = StepState()

    # -- hooks --------------------------------------------------------------------------------------------------

    @property
    def wants_ahead(self) -> bool:
        ready = self.resident is not None and self.query_shape is not None and self.kv.host.length > 0
        # Right behind the layer that stores its KV it would choose before that layer has written back.
        return ready and self.config.layer_ahead and self.stored_by != self.layer_idx - 1

    def ahead(self, step: Step, query: torch.Tensor | None) -> None:
        if query is None:
            return
        state = self.state
        run = self.executor if step.clock is None else self.executor.captured(step.clock)
        query = state.predicted = query.to(self.dtype)
        run.select(self, step, query)
        state.guessed, state.checks = run.ask_gate(self, step)
        if state.guessed:
            run.submit_cpu(self, step, query)

    def append(self, keys: torch.Tensor, values: torch.Tensor, step: Step | None = None) -> None:
        if step is None or step.clock is None:
            if self.standing is not None:
                self.changed()
            return super().append(keys, values, step)
        self.executor.captured(step.clock).append(self, step, keys, values)

    def attend(self, step: Step, query: torch.Tensor) -> Partial:
        state = self.state
        run = self.executor if step.clock is None else self.executor.captured(step.clock)
        if self.resident is None and self.kv.host.length:
            self._load_residents(step, query)
        if self.executor.recalling:
            with step.counters.timed(self.layer_idx, "join"):
                self.executor.join_recall(self)
        if self.resident is not None:
            if state.pick is None:
                run.select(self, step, query)
            if not state.started:
                run.submit_cpu(self, step, query)
        here = run.attend_device(self, step, query)
        share = run.join_cpu(self, step, query) if state.started else None
        run.count(self, step, query)
        looked_at = step.fuses_more or state.checks or step.monitor is not None
        result = run.merge(here, share, torch.float32 if looked_at else query.dtype)
        if state.checks and share is not None and state.predicted is not None:
            again = self.executor.attend_again(self, step, state.predicted)
            self.gate.judge(result, run.merge(here, again, torch.float32))
        if step.monitor is not None:
            step.monitor.watch(step, self, query, result, self._seen, state.guessed)
        return result

    def observe(self, step: Step, query: torch.Tensor) -> None:
        self.selector.observe(query, self.kv_heads, self.scoring.scale, step.mask)

    def settle(self, step: Step) -> None:
        self._write_back(step)
        state = self.state
        # A draft's tokens are taken back: what it chose is not worth crossing the link.
        if state.pick is not None and step.role is not Role.DRAFT:
            run = self.executor if step.clock is None else self.executor.captured(step.clock)
            share = run.recall_share(self, step)
            if state.started and share is not None:
                run.recall(self, step, share)
        self.state = StepState()
        if self._by_share and self.resident is not None and self.slots() > 1.25 * self.resident.slots:
            # A share budget has outgrown its slots: the next attention loads residents again.
            self.executor.join_recall(self)
            self.resident = None

    def end_step(self) -> None:
        super().end_step()
        if self.state.pick is not None:
            self._drop_job()

    def prefilled(self, step: Step, query: torch.Tensor) -> None:
        if self.kv.host.blocks and step.queries >= self.config.block_size:
            self.executor.join_recall(self)
            self._load_residents(step, query)

    def past_chunks(self, step: Step, past: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        return self.executor.past_chunks(self, step, past) or super().past_chunks(step, past)

    # -- structure ----------------------------------------------------------------------------------------------

    def crop(self, length: int) -> None:
        super().crop(length)
        self._fit_to_host()

    def rollback(self, mark: Any) -> None:
        """As for ``Method``: KV and digests are those of ``mark``.

        Blocks that the failed pass recalled stay resident: to undo that, every step would copy the ids, and the blocks
        that they replaced would have to come back over the link. Residents are attended whether chosen or not, so with
        a budget below the context the next tokens may differ from those of a run without the failure. With
        ``budget=None`` every block is attended anyway, and nothing is recalled that takes another's place.
        """
        super().rollback(mark)
        self._fit_to_host()
        self.executor.pages_changed(self)

    def _fit_to_host(self) -> None:
        self.selector.crop(self.kv.host.blocks)
        with self.changing_residents() as resident:
            if resident is not None:
                resident.crop(self.kv.host.blocks)

    @contextlib.contextmanager
    def changing_residents(self) -> Iterator[Any]:
        """Yield the residents. An error drops them, as slots may be inconsistent; they are loaded again later."""
        resident, self.resident = self.resident, None
        yield resident
        self.resident = resident

    def select_rows(self, rows: torch.Tensor) -> None:
        super().select_rows(rows)
        self.selector.select_rows(rows)
        if self.resident is not None:
            self.resident.select_rows(rows)
        self.executor.pages_changed(self, rows=True)

    def borrow(self, other: Any) -> None:
        super().borrow(other)
        self.selector = LentSelector(self.config, self.layer_idx, other.selector)
        self.executor.pages_changed(self, rows=True)

    def learn_from(self, others: Sequence[Method], rows: Sequence[int]) -> None:
        super().learn_from(others, rows)
        self.selector.learn_from([getattr(other, "selector", None) for other in others], rows)

    def fork(self) -> Self:
        twin = super().fork()
        twin.selector, twin.gate = self.selector.fork(), self.gate.fork()
        twin.resident = self.resident and self.resident.fork()
        twin.executor, twin.recall_policy = self.executor.fork(), copy.copy(self.recall_policy)
        twin.state = StepState()
        return twin

    def state_dict(self) -> State:
        held, resident = super().state_dict(), self.resident
        return held | {
            "selector": self.selector.state_dict(),
            "gate": self.gate.state_dict(),
            "recall_steps": self.recall_policy.steps,
            "slots": resident and resident.slots,
            "residents": resident and resident.state_dict(self.kv.host),
        }

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        host, heads = self.kv.host, self.kv_heads
        parts = state_in(state, "selector"), host.batch, heads, host.blocks, self.kv.device
        self.selector.load_state_dict(*parts)
        if not self.selector.blocks:
            self.selector.extend_early(host, host.blocks)  # codes of another digest were left out
        self.gate.load_state_dict(state_in(state, "gate"))
        self.recall_policy.steps = count_in(state, "recall_steps")
        slots = maybe_count_in(state, "slots", self.config.blocks(self.kv.length) + MOST_SPARE_SLOTS)
        self.executor.pages_changed(self, rows=True)
        if slots is not None:
            resident = self.executor.new_residents(self, slots)
            resident.load_state_dict(state_in(state, "residents"), host, host.blocks)
            self.resident = resident

    def drain(self) -> None:
        self.changed()
        super().drain()
        self._drop_job()
        self.executor.drain(self)

    def tier_bytes(self) -> dict[str, int]:
        held, resident = super().tier_bytes(), self.resident  # read once: another thread may be decoding
        held["device"] += resident.used_bytes if resident else 0
        return held | {"digests": self.selector.used_bytes}

    @property
    def variant(self) -> str:
        return f"{super().variant} ({self.executor.variant})"

    # -- steps that are captured once and replayed ----------------------------------------------------------------

    def capture_key(self, step: Step) -> Any:
        ready = self.resident is not None and self.query_shape is not None
        key = self.executor.capture_key(self, step) if ready else None
        return None if key is None else (key, self.gate.predicts)

    @property
    def compares(self) -> bool:
        return self.gate.rule == "auto" and self.config.layer_ahead

    def prepare_replays(self, step: Step, padding_mask: torch.Tensor | None) -> ReplayPart:
        return self.executor.prepare_replays(self, step, padding_mask)

    def before_replay(self, step: Step) -> float:
        share = self.recall_policy.next(step.tokens)
        return NO_SHARE if share is None else share

    def after_replay(self, step: Step) -> None:
        self.kv.grew(1)
        self.executor.after_replay(self)

    @property
    def is_full(self) -> bool:
        return self.kv.overdue(self.window_blocks) > 0

    def write_back(self, step: Step) -> None:
        # Here the new block is adopted after the step's recall; in an eager step, before it.
        self._write_back(step)

    @property
    def can_fill(self) -> bool:
        alone = self.kv.overdue(self.window_blocks) == 1
        return alone and self.selector.has_room and self.executor.can_fill(self)

    def fill(self, clock: Clock) -> None:
        block = self.kv.buffers()[0][:, :, : self.config.block_size]
        self.selector.encode_at(clock.blocks, block, clock.token_mask(self.config.block_size))
        self.executor.captured(clock).fill(self)

    def filling(self, fill: Fill) -> None:
        self.changed()
        self.resident.adopting(self.kv.host.blocks)
        self.kv.filling(fill.has_run)

    def filled(self, mark: Mark) -> None:
        self.executor.filled(self, mark)
        self.selector.grew()
        self._grow_slots()

    def unfilled(self) -> None:
        self.kv.unfilled()

    def abort_replay(self) -> None:
        self.executor.abort_replay(self)
        self.state = StepState()

    # -- the parts of a step ------------------------------------------------------------------------------------

    def _drop_job(self) -> None:
        self.executor.drop_job(self)
        self.state = StepState()

    def _seen(self) -> list[Pick]:
        return [] if self.resident is None else self.executor.seen(self)

    def slots(self) -> int:
        """Slots per row and KV head: as configured, but not many more than there are blocks."""
        tokens, held = self._resident_tokens, self.kv.host.blocks
        if isinstance(tokens, float):
            return self.config.blocks(max(self.config.block_size, int(tokens * self.kv.length)))
        return min(self.config.blocks(tokens), held + max(SPARE_BLOCKS, held // 4))

    def _grow_slots(self) -> None:
        """Add slots for further blocks, up to the configured number."""
        if self.resident is None or self._by_share or self.kv.host.blocks < self.resident.slots:
            return
        slots = self.slots()
        if slots > self.resident.slots:
            with self.changing_residents() as resident, resident_memory(self, slots):
                resident.grow(slots)

    def _load_residents(self, step: Step, query: torch.Tensor) -> None:
        resident, self.resident = self.resident, None  # stays None if this fails
        self.resident = self.executor.load_residents(self, step, query, resident)
        self.recall_policy.steps = 0

    def _write_back(self, step: Step | None) -> None:
        full = self.kv.full_blocks(self.window_blocks) if self.kv.overdue(self.window_blocks) > 0 else None
        if full is None:
            return
        self.changed()
        attending = [self, *self.readers.values()]
        for layer in attending:
            layer.executor.join_recall(layer)  # its thread reads the host's table
        size, first, padding_mask = self.config.block_size, self.kv.host.blocks, None
        count = full[0].shape[2] // size
        if step is not None and step.mask is not None:
            padding_mask = step.token_mask(size, self.kv.device)

        def past() -> tuple[torch.Tensor, torch.Tensor | None]:
            self.written.finish()
            keys = self.kv.host.read(0, first * size)[0]
            return keys, None if padding_mask is None else padding_mask[:, :first]

        new = None if padding_mask is None else padding_mask[:, first : first + count]
        self.selector.extend(full[0], new, past)
        for layer in attending:
            if layer.resident is not None and count == 1:
                with layer.changing_residents() as resident:
                    layer.executor.adopt(resident, first, *full)
        self.executor.write_back(self, step)
        for layer in attending:
            if layer is not self:
                layer.executor.pages_grew(layer, first)
            layer._grow_slots()
