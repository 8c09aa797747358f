"""Decode steps that are captured once and replayed: a method's part, and what the graph and it tell each other.

See :mod:`scout_hf.graph`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from scout_hf.kernels.cpu import StepJob

if TYPE_CHECKING:
    from scout_hf.graph_clock import Clock, Fill
    from scout_hf.step import Step
    from scout_hf.stores.streams import Mark


@dataclass
class Standing:
    """Whether all that a captured step assumes still holds; one object for all layers."""

    valid: bool = True


class ReplayPart(NamedTuple):
    """A layer's part of the replays that follow.

    layer : int
    job : StepJob or None
        The CPU work of each step.
    held : float or Tensor (batch, kv_heads, slots) of int
        Tokens attended besides the tail and the CPU's share, mean over rows and KV heads; or the blocks that they are
        in, negative for none.
    """

    layer: int
    job: StepJob | None
    held: float | torch.Tensor


class ReplayCounts:
    """Counts replayed steps, and adds them to the counters of all layers when these are read; jobs count by themselves.

    Parameters
    ----------
    step : Step
        For its counters and its padding mask.
    parts : sequence of ReplayPart
    block_size : int
        Tokens of a block.
    owner
        While it lives, further steps may follow.
    """

    def __init__(self, step: Step, parts: Sequence[ReplayPart], block_size: int, owner: Any):
        self._counters = step.counters
        self._owner: Callable[[], Any] = weakref.ref(owner)
        self._layers = tuple(part.layer for part in parts)
        self._held = [
            (tuple(part.layer for part in alike), _tokens(step, alike, block_size)) for alike in _of_one_shape(parts)
        ]
        self._steps = 0
        self._context: float | torch.Tensor = 0.0
        self._tail: float | torch.Tensor = 0.0
        self._counters.follow(self)

    @property
    def over(self) -> bool:
        """Whether no further steps can follow."""
        return self._owner() is None

    def add(self, context: float | torch.Tensor, tail: float | torch.Tensor) -> None:
        """Count one step: tokens of the context, and of the tail, means over rows."""
        self._steps += 1
        self._context = self._context + context
        self._tail = self._tail + tail

    def end(self) -> None:
        """Add what is left; no further steps follow."""
        self.fold()
        self._owner = lambda: None

    def fold(self) -> None:
        """Add all steps so far to the counters, and begin anew; as many operations for any number of layers."""
        steps, self._steps = self._steps, 0
        context, tail, self._context, self._tail = self._context, self._tail, 0.0, 0.0
        if steps:
            self._counters.add_each("decodes", self._layers, steps)
            self._counters.add_each("context", self._layers, context)
            for layers, held in self._held:
                self._counters.add_each("attended", layers, tail + steps * held)


def _of_one_shape(parts: Sequence[ReplayPart]) -> list[list[ReplayPart]]:
    found: dict[Any, list[ReplayPart]] = {}
    for part in parts:
        found.setdefault(part.held.shape if isinstance(part.held, torch.Tensor) else part.held, []).append(part)
    return list(found.values())


def _tokens(step: Step, parts: list[ReplayPart], block_size: int) -> float | torch.Tensor:
    """What these layers hold in tokens, all the same or (layers,) of float32."""
    first = parts[0].held
    if not isinstance(first, torch.Tensor):
        return first
    ids = torch.stack([part.held for part in parts if isinstance(part.held, torch.Tensor)])
    held = torch.full_like(ids, block_size)
    if step.mask is not None:
        real = step.block_tokens(block_size, ids.device)[None, :, None]
        held = real.expand(len(ids), -1, ids.shape[2], -1).gather(3, ids.clamp(min=0).long())
    return held.masked_fill(ids < 0, 0).sum(dim=(1, 2, 3), dtype=torch.float32) / first[:, :, 0].numel()


class Replays:
    """The part of a method for steps that are captured once and replayed.

    A method with a capture key gets ``step.clock`` in the captured pass; its ``kv`` must be a ``TwoTierKV``.
    """

    name: str

    standing: Standing | None = None
    """Set by the graph while it need not ask for the key."""

    def changed(self) -> None:
        """To be called when anything of the capture key, the store or the residents may have changed."""
        if self.standing is not None:
            self.standing.valid, self.standing = False, None

    def capture_key(self, step: Step) -> Any:
        """All that a captured step of this layer assumes; a change voids the capture. None: it cannot be captured.

        Asked again only after :meth:`changed`, and when the context reaches another block.
        """
        return None

    @property
    def compares(self) -> bool:
        """Whether it wants a step without a graph now and then, with ``step.compares``."""
        return False

    def prepare_replays(self, step: Step, padding_mask: torch.Tensor | None) -> ReplayPart:
        """Called whenever the capture key was asked for, before a capture or the replays that follow.

        Parameters
        ----------
        step : Step
        padding_mask : Tensor (batch, capacity) of bool, on the CPU, or None

        Returns
        -------
        ReplayPart
            The CPU work that each of these steps waits for, and what else counts.
        """
        raise NotImplementedError(f"method {self.name!r} returns a capture_key but defines no prepare_replays")

    def before_replay(self, step: Step) -> float:
        """Called before each replay, and before the capture: this layer's entry of ``step.clock.shares``.

        Launches nothing, like :meth:`after_replay`.
        """
        return 0.0

    def after_replay(self, step: Step) -> None:
        """Called on the host after the launch of a replay: count the token."""

    @property
    def is_full(self) -> bool:
        """Whether a block is to be written back, after ``after_replay``."""
        return False

    def write_back(self, step: Step) -> None:
        """Write back full blocks, of this layer alone."""

    @property
    def can_fill(self) -> bool:
        """Whether ``fill`` would do what ``write_back`` does: one block is full, and there is room for it."""
        return False

    def fill(self, clock: Clock) -> None:
        """Captured, and launched after the replay of a step that fills a block: write back block ``clock.blocks``."""

    def filling(self, fill: Fill) -> None:
        """Called before that launch: until ``filled`` or ``unfilled``, a rollback asks ``fill`` whether it has run."""

    def filled(self, mark: Mark) -> None:
        """Called after that launch, whose end is ``mark``."""

    def unfilled(self) -> None:
        """Called instead, if there was no launch."""

    def abort_replay(self) -> None:
        """Called if the replay after ``before_replay`` does not run."""
