"""Whether what belongs together was changed together: marks that stand while a change runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from scout_hf.errors import CacheStateError
from scout_hf.step import Step, active_step, set_active_step

LINEAR = "a forward pass failed half way, and linear-attention layers, which cannot go back,"


class ChangeGuard:
    """Of one cache, known to it, to its layers, and to shallow copies, which have the same layers.

    Attributes
    ----------
    torn : str or None
        What is being changed. Where it stands and nothing runs, that change was interrupted.
    open_pass : Step or None
        The forward pass that is running, or was left by an interrupt.
    """

    def __init__(self) -> None:
        self.torn: str | None = None
        self.open_pass: Step | None = None

    def check(self) -> None:
        """Raise CacheStateError if a change was left half way."""
        if self.torn is not None:
            raise CacheStateError(
                f"this cache cannot be used any more: {self.torn} left it half changed, and its layers no longer fit "
                "together; empty it with cache.reset(), start with a new ScoutCache, or go on with a fork made before"
            )

    def ready(self) -> None:
        """Take back a pass that an interrupt left half way; CacheStateError if the cache is not whole after that."""
        self.end_interrupted_pass()
        self.check()

    def refuse_in_pass(self, what: str) -> None:
        """Raise CacheStateError while a thread is inside a pass, which goes on unharmed."""
        step = self.open_pass
        if step is not None and step.is_running():
            where = "this thread" if step is active_step() else "another thread"
            raise CacheStateError(
                f"{what} was called in the middle of a forward pass of {where} with this cache, while some layers have "
                "the new tokens and others do not; do it before or after the pass, or give each thread a fork, made "
                "between passes"
            )

    def between_passes(self, what: str) -> None:
        """``ready`` for ``what`` changes the cache; CacheStateError in a pass that is running."""
        self.refuse_in_pass(what)
        self.ready()

    @contextlib.contextmanager
    def changing(self, what: str) -> Iterator[None]:
        """While the block runs, and for good if it does not get through, the cache is torn."""
        self.check()
        self.torn = what
        yield
        self.torn = None

    def enter_pass(self, step: Step) -> None:
        """The calling thread is in this pass from now on."""
        self.open_pass = step
        set_active_step(step)

    def leave_pass(self) -> None:
        """The calling thread is in no pass any more, and the last one cannot be taken back."""
        # In this order an interrupt between the two leaves a pass that is found and taken back.
        if self.open_pass is not None and active_step() is self.open_pass:
            set_active_step(None)
        self.open_pass = None

    def end_interrupted_pass(self) -> None:
        """Take back a pass that an interrupt left half way, in whatever thread."""
        if self.open_pass is not None and not self.open_pass.is_running():
            self.open_pass.abort()

    def __deepcopy__(self, memo: dict[int, Any]) -> ChangeGuard:
        twin = memo[id(self)] = ChangeGuard()
        twin.torn = self.torn
        return twin
