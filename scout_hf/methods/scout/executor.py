"""What the policy of two tiers asks of whoever carries it out, and what both know of a decode step so far.

An executor keeps what belongs to its device and to its way of talking to the CPU. What it works on is the layer's, and
handed to it: cache, digests, residents and the state of the step.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from scout_hf.config import ScoutConfig
from scout_hf.errors import ResidentMemoryError
from scout_hf.fusion import Partial
from scout_hf.kernels.cpu import Attended, Ticket
from scout_hf.selection import Pick
from scout_hf.step import Step
from scout_hf.stores import TwoTierKV

if TYPE_CHECKING:
    from typing_extensions import Self

    from scout_hf.graph import Clock
    from scout_hf.methods.scout.policy import TwoTierScout as Layer


class Counted(NamedTuple):
    """Blocks over all rows and KV heads: those that the CPU attends, and all that were chosen."""

    cpu: int
    chosen: int


@dataclass(slots=True)
class StepState:
    """One decode step of one layer, from ``ahead`` to ``settle``; replaced as a whole."""

    pick: Any = None  # the chosen blocks, a Pick or a Choice
    missing: torch.Tensor | None = None  # which of them are not resident, where the host knows
    scores: torch.Tensor | None = None  # (batch, kv_heads, blocks): the order of those, where slots are too few
    ticket: Ticket[Attended] | None = None  # the CPU's job, where the host waits for it
    predicted: torch.Tensor | None = None  # the query that ``ahead`` got
    counted: Counted | None = None  # blocks, where the host counts them
    attended: float | torch.Tensor = 0.0  # tokens per row and KV head
    started: bool = False  # the CPU has its job,
    guessed: bool = False  # with the predicted query
    checks: bool = False  # both queries are compared


class StepExecutor(ABC):
    """The operations of one decode step, in their order; they read and write ``layer.state``."""

    @abstractmethod
    def select(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        """Choose blocks: ``pick``, and what is needed of ``missing`` and ``scores``."""

    def ask_gate(self, layer: Layer) -> tuple[bool, bool]:
        """Whether the CPU may start with the predicted query, and whether to compare it with the real one."""
        return layer.gate.in_prediction(), layer.gate.checking

    @abstractmethod
    def submit_cpu(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        """Let the CPU attend to the missing blocks with this query; ``started``."""

    @abstractmethod
    def attend_device(self, layer: Layer, step: Step, query: torch.Tensor) -> Any:
        """Attention to residents and tail, in the form that :meth:`merge` takes; adds to ``attended``."""

    @abstractmethod
    def join_cpu(self, layer: Layer, step: Step, query: torch.Tensor) -> Partial | None:
        """The CPU's share on the device, None where there is none."""

    @abstractmethod
    def merge(self, here: Any, share: Partial | None) -> Partial:
        """One result of the device's and the CPU's."""

    def count(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        """Tell ``stats()`` of this attention."""
        state, index = layer.state, layer.layer_idx
        step.counters.attended(index, step.context(), state.attended)
        if state.counted is not None:
            step.counters.cpu_share(index, *state.counted)
        if state.predicted is not None:
            step.counters.predicted(index, state.predicted, query)

    def recall_share(self, layer: Layer, step: Step) -> float | torch.Tensor | None:
        """The CPU's share from which on this step recalls; None if it does not. Once a step."""
        return layer.recall_policy.next(step.tokens)

    @abstractmethod
    def recall(self, layer: Layer, step: Step, share: float | torch.Tensor) -> None:
        """Start to swap missing blocks in for residents not chosen, if the CPU has at least ``share`` of all chosen."""


class CaptureExecutor(StepExecutor):
    """The operations of a step that is being captured."""

    @abstractmethod
    def append(self, layer: Layer, step: Step, keys: torch.Tensor, values: torch.Tensor) -> None:
        """As ``Method.append``, where only the device knows how many tokens there are."""


class Executor(StepExecutor):
    """The operations of one layer on one device.

    Attributes
    ----------
    cpu_query : str
        ``ScoutConfig.cpu_query``, as far as this executor can follow it.
    recalling : bool
        Whether a recall may be in flight.
    """

    recalling: Any = True

    def __init__(self, config: ScoutConfig, kv: TwoTierKV):
        self.cpu_query = config.cpu_query

    @property
    @abstractmethod
    def variant(self) -> str:
        """What runs, for reports."""

    def captured(self, clock: Clock) -> CaptureExecutor:
        """The operations of a step that is being captured; for executors with a ``capture_key``."""
        raise NotImplementedError

    @abstractmethod
    def attend_again(self, layer: Layer, step: Step, query: torch.Tensor) -> Partial | None:
        """The CPU's share once more with another query, uncounted."""

    @abstractmethod
    def load_residents(self, layer: Layer, step: Step, query: torch.Tensor, slots: Any) -> Any:
        """Fill ``slots``, or new ones for None, with the blocks that this query chooses, best first."""

    @abstractmethod
    def adopt(self, slots: Any, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put block ``first``, which is leaving the tail, into free slots."""

    @abstractmethod
    def join_recall(self, layer: Layer) -> None:
        """What comes now finds recalled blocks in their slots."""

    def write_back(self, layer: Layer, step: Step | None) -> None:
        """Move the tail's older blocks to the host; ``layer.written`` is the end of that."""
        layer.written = layer.kv.write_back(layer.window_blocks)

    def past_chunks(
        self, layer: Layer, step: Step, past: int
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]] | None:
        """As ``Method.past_chunks``, if this executor has a way of its own."""
        return None

    @abstractmethod
    def seen(self, layer: Layer) -> list[Pick]:
        """The blocks that this step attended."""

    # -- changes of the cache -----------------------------------------------------------------------------------

    @abstractmethod
    def drop_job(self, layer: Layer) -> None:
        """Wait until the CPU does nothing for this layer, and forget its result."""

    @abstractmethod
    def drain(self, layer: Layer) -> None:
        """Wait for copies; residents whose blocks did not come are gone."""

    def pages_changed(self, layer: Layer, rows: bool = False) -> None:
        """The host's pages may be others than before, and with ``rows`` the batch as well."""

    def fork(self) -> Self:
        """One for a twin of the layer; nothing is in flight."""
        return copy.copy(self)

    # -- captured steps, see ``Method`` ---------------------------------------------------------------------------

    def capture_key(self, layer: Layer, step: Step) -> Any:
        """As ``Method.capture_key``."""
        return None

    def before_replay(self, layer: Layer, step: Step, padding_mask: torch.Tensor | None) -> None:
        """As ``Method.before_replay``, but for the recall."""

    def after_replay(self, layer: Layer, step: Step) -> None:
        """As ``Method.after_replay``; the new token is in the tail."""

    def abort_replay(self, layer: Layer) -> None:
        """As ``Method.abort_replay``."""


@contextlib.contextmanager
def resident_memory(layer: Layer, slots: int) -> Iterator[None]:
    """A device without the memory for so many slots says which setting asked for them."""
    try:
        yield
    except RuntimeError as error:
        # Torch says it with a RuntimeError, which may also be of something else.
        if "memory" not in str(error):
            raise
        kv, config = layer.kv, layer.config
        wanted = 2 * kv.batch * layer.kv_heads * slots * kv.block_size * kv.host.head_dim * kv.host.dtype.itemsize
        raise ResidentMemoryError(
            f"no memory on {kv.device} for {wanted} bytes of resident blocks in layer {layer.layer_idx} ({error}): "
            f"resident={config.resident!r} and budget={config.budget!r} keep {slots * kv.block_size} tokens per layer "
            "and KV head on the device; set a smaller resident (tokens): the CPU attends to what is not resident"
        ) from error
