"""Decode steps that are captured once and replayed: a method's part, and what the graph and it tell each other.

See :mod:`scout_hf.graph`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from scout_hf.kernels.cpu import StepJob, StepTotals

if TYPE_CHECKING:
    from scout_hf.step import Step


@dataclass
class Standing:
    """Whether all that a captured step assumes still holds; one object for all layers."""

    valid: bool = True


class ReplayPart(NamedTuple):
    """A layer's part of the replays that follow.

    layer : int
    lists : int
        Rows times KV heads.
    job : StepJob or None
        The CPU work of each step.
    held : float or Tensor
        Tokens attended besides the tail and the CPU's share, mean over rows and KV heads.
    """

    layer: int
    lists: int
    job: StepJob | None
    held: float | torch.Tensor


class ReplayCounts:
    """Counts replayed steps, and adds them to the counters of all layers when these are read.

    Parameters
    ----------
    step : Step
        For its counters.
    parts : sequence of ReplayPart
    owner
        While it lives, further steps may follow.
    """

    def __init__(self, step: Step, parts: Sequence[ReplayPart], owner: Any):
        self._counters = step.counters
        self._owner: Callable[[], Any] = weakref.ref(owner)
        # Without the jobs, which keep host memory alive.
        self._layers: list[tuple[int, int, StepTotals | None, float | torch.Tensor]] = [
            (part.layer, part.lists, None if part.job is None else part.job.totals, part.held) for part in parts
        ]
        self._steps = 0
        self._context: float | torch.Tensor = 0.0
        self._tail: float | torch.Tensor = 0.0
        self._counters.replayed(self)

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
        """Add all steps so far to the counters, and begin anew."""
        steps, self._steps = self._steps, 0
        context, tail, self._context, self._tail = self._context, self._tail, 0.0, 0.0
        for layer, lists, totals, held in self._layers:
            if steps:
                self._counters.add("decodes", layer, steps)
                self._counters.add("context", layer, context)
                self._counters.add("attended", layer, tail + steps * held)
            if totals is not None:
                done = totals.take()
                if done.chosen:
                    self._counters.add("attended", layer, done.tokens / lists)
                    self._counters.cpu_share(layer, done.listed, done.chosen)


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

        Launches nothing, like :meth:`after_replay` in steps that fill no block.
        """
        return 0.0

    def after_replay(self, step: Step) -> None:
        """Called on the host after the launch of a replay: count the token, write back full blocks."""

    def abort_replay(self) -> None:
        """Called if the replay after ``before_replay`` does not run."""
