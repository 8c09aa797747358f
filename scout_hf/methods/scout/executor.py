"""The interface between the two-tier policy and its executors, and the state of a decode step.

An executor owns device-specific state and the hand-over to the CPU. Cache, digests, residents and step state belong to
the layer, which is passed to every operation.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from scout_hf.config import ScoutConfig
from scout_hf.errors import ResidentMemoryError
from scout_hf.fusion import Partial
from scout_hf.kernels.cpu import Attended, Ticket
from scout_hf.methods.replays import ReplayPart
from scout_hf.selection import Pick
from scout_hf.step import Step
from scout_hf.stores import TwoTierKV

if TYPE_CHECKING:
    from typing_extensions import Self

    from scout_hf.graph_clock import Clock
    from scout_hf.methods.scout.policy import TwoTierScout as Layer
    from scout_hf.stores.streams import Mark


class Counted(NamedTuple):
    """Blocks over all rows and KV heads: attended by the CPU, and chosen in total."""

    cpu: int
    chosen: int


@dataclass(slots=True)
class StepState:
    """State of one decode step of one layer, from ``ahead`` to ``settle``; replaced as a whole."""

    pick: Any = None  # the chosen blocks, a Pick or a Choice
    missing: torch.Tensor | None = None  # which of them are not resident, if the host knows it
    scores: torch.Tensor | None = None  # (batch, kv_heads, blocks): ranks them if slots are too few
    ticket: Ticket[Attended] | None = None  # the CPU job, if the host waits for it
    predicted: torch.Tensor | None = None  # the query given to ``ahead``
    counted: Counted | None = None  # block counts, if the host knows them
    attended: float | torch.Tensor = 0.0  # tokens per row and KV head
    started: bool = False  # the CPU job is submitted
    guessed: bool = False  # it uses the predicted query
    checks: bool = False  # this step compares both queries


class StepExecutor(ABC):
    """The operations of one decode step, in order; they read and write ``layer.state``."""

    @abstractmethod
    def select(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        """Choose the top-k blocks: set ``pick``, and ``missing`` and ``scores`` if needed."""

    def ask_gate(self, layer: Layer, step: Step) -> tuple[bool, bool]:
        """Whether CPU attention may use the predicted query, and whether to compare it with the real one."""
        return layer.gate.in_prediction(step.compares), layer.gate.checking

    @abstractmethod
    def submit_cpu(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        """Start CPU attention over the missing blocks with ``query``; set ``started``."""

    @abstractmethod
    def attend_device(self, layer: Layer, step: Step, query: torch.Tensor) -> Any:
        """Attention over residents and tail, in the form that :meth:`merge` takes; adds to ``attended``."""

    @abstractmethod
    def join_cpu(self, layer: Layer, step: Step, query: torch.Tensor) -> Partial | None:
        """Wait for CPU attention; its result on the device, or None if there is none."""

    @abstractmethod
    def merge(self, here: Any, share: Partial | None, dtype: torch.dtype) -> Partial:
        """Merge the results of device and CPU by their LSE; ``dtype`` is that in which the output is wanted."""

    def count(self, layer: Layer, step: Step, query: torch.Tensor) -> None:
        """Count this attention for ``stats()``."""
        state, index = layer.state, layer.layer_idx
        step.counters.attended(index, step.tokens if step.mask is None else step.context(), state.attended)
        if state.counted is not None:
            step.counters.cpu_share(index, *state.counted)
        if state.predicted is not None:
            step.counters.predicted(index, state.predicted, query)

    def recall_share(self, layer: Layer, step: Step) -> float | torch.Tensor | None:
        """The recall threshold on the CPU's share of blocks; None for no recall. Call once per step."""
        return layer.recall_policy.next(step.tokens)

    @abstractmethod
    def recall(self, layer: Layer, step: Step, share: float | torch.Tensor) -> None:
        """Start a recall of missing blocks if the CPU attends at least ``share`` of the chosen ones.

        They replace residents that were not chosen.
        """


class CaptureExecutor(StepExecutor):
    """The operations of a decode step during graph capture."""

    @abstractmethod
    def append(self, layer: Layer, step: Step, keys: torch.Tensor, values: torch.Tensor) -> None:
        """As ``Method.append``, but only the device knows the number of tokens."""

    @abstractmethod
    def fill(self, layer: Layer) -> None:
        """Copy the tail's oldest block to its host page and into free slots, and move the rest to the front."""


class Executor(StepExecutor):
    """The operations of one layer on one device.

    Attributes
    ----------
    recalling : bool
        Whether a recall may be in flight.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    """Fields of ``ScoutConfig`` that have an effect with this executor only."""
    recalling: Any = True

    def __init__(self, config: ScoutConfig, kv: TwoTierKV):
        pass

    @property
    @abstractmethod
    def variant(self) -> str:
        """Name of the executor, for reports."""

    def captured(self, clock: Clock) -> CaptureExecutor:
        """The operations for graph capture; for executors with a ``capture_key``."""
        raise NotImplementedError

    @abstractmethod
    def attend_again(self, layer: Layer, step: Step, query: torch.Tensor) -> Partial | None:
        """Run the CPU attention of this step again with another query; not counted."""

    @abstractmethod
    def new_residents(self, layer: Layer, slots: int) -> Any:
        """So many empty slots; ResidentMemoryError if there is no memory for them."""

    @abstractmethod
    def load_residents(self, layer: Layer, step: Step, query: torch.Tensor, slots: Any) -> Any:
        """Fill ``slots`` (new ones if None) with the top-k blocks of this query."""

    @abstractmethod
    def adopt(self, slots: Any, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Copy block ``first``, which is leaving the tail, into free slots."""

    @abstractmethod
    def join_recall(self, layer: Layer) -> None:
        """Make later work wait until recalled blocks are in their slots."""

    def write_back(self, layer: Layer, step: Step | None) -> None:
        """Write the tail's older blocks back to the host."""
        layer.kv.write_back(layer.window_blocks)

    def past_chunks(
        self, layer: Layer, step: Step, past: int
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]] | None:
        """As ``Method.past_chunks``; None for the default."""
        return None

    @abstractmethod
    def seen(self, layer: Layer) -> list[Pick]:
        """The blocks that this step attended, besides the tail."""

    # -- changes of the cache -----------------------------------------------------------------------------------

    @abstractmethod
    def drop_job(self, layer: Layer) -> None:
        """Wait for the CPU job of this layer and drop its result."""

    @abstractmethod
    def drain(self, layer: Layer) -> None:
        """Wait for in-flight copies; drop the residents if a recall failed."""

    def pages_grew(self, layer: Layer, first: int) -> None:
        """Called after another layer wrote blocks from ``first`` on to the host that this layer reads."""

    def pages_changed(self, layer: Layer, rows: bool = False) -> None:
        """Called after the host's page table has changed; ``rows``: the batch as well."""

    def fork(self) -> Self:
        """An executor for a fork of the layer; nothing is in flight."""
        return copy.copy(self)

    # -- captured steps, see ``Method`` ---------------------------------------------------------------------------

    def capture_key(self, layer: Layer, step: Step) -> Any:
        """As ``Method.capture_key``."""
        return None

    def prepare_replays(self, layer: Layer, step: Step, padding_mask: torch.Tensor | None) -> ReplayPart:
        """As ``Method.prepare_replays``."""
        raise NotImplementedError

    def after_replay(self, layer: Layer) -> None:
        """As ``Method.after_replay``; the tail already counts the new token."""

    def can_fill(self, layer: Layer) -> bool:
        """Whether host and residents have room for a block that :meth:`CaptureExecutor.fill` writes."""
        return False

    def filled(self, layer: Layer, mark: Mark) -> None:
        """Count that block, written when ``mark`` is reached."""
        raise NotImplementedError

    def abort_replay(self, layer: Layer) -> None:
        """As ``Method.abort_replay``."""


@contextlib.contextmanager
def resident_memory(layer: Layer, slots: int) -> Iterator[None]:
    """Context manager: turn out-of-memory errors for ``slots`` slots into a ResidentMemoryError with advice."""
    try:
        yield
    except RuntimeError as error:
        # Torch reports lack of memory as a RuntimeError; other RuntimeErrors pass through.
        if "memory" not in str(error):
            raise
        kv, config = layer.kv, layer.config
        needed = 2 * kv.batch * layer.kv_heads * slots * kv.block_size * kv.host.head_dim * kv.host.dtype.itemsize
        raise ResidentMemoryError(
            f"no memory on {kv.device} for {needed} bytes of resident blocks in layer {layer.layer_idx} ({error}): "
            f"resident={config.resident!r} and budget={config.budget!r} keep {slots * kv.block_size} tokens per layer "
            "and KV head on the device; set a smaller resident (tokens): the CPU attends blocks that are not resident"
        ) from error
