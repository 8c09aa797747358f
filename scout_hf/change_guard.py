"""Detects changes of a cache that were interrupted, so that some of its layers changed and others did not."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from scout_hf.errors import CacheStateError
from scout_hf.step import Step, active_step, set_active_step

LINEAR = "a forward pass failed, and linear-attention layers, which cannot be rolled back,"


class ChangeGuard:
    """State of one cache, shared with its layers and with shallow copies, which have the same layers.

    Attributes
    ----------
    torn : str or None
        The change that is running. If it is set and nothing runs, that change was interrupted.
    open_pass : Step or None
        The forward pass that is running or was interrupted.
    """

    def __init__(self) -> None:
        self.torn: str | None = None
        self.open_pass: Step | None = None
        # How often anything began to change.
        self.changes = 0
        # Held while a change begins, so that of two threads one does; not while it runs.
        self._turn = threading.RLock()

    def check(self) -> None:
        """Raise CacheStateError if a change was interrupted."""
        if self.torn is not None:
            raise CacheStateError(
                f"this cache cannot be used any more: {self.torn} left it half changed, and its layers no longer fit "
                "together; empty it with cache.reset(), start with a new ScoutCache, or use a fork made before"
            )

    def ready(self) -> None:
        """Roll back a pass that was interrupted; CacheStateError if the cache is inconsistent after that."""
        self.end_interrupted_pass()
        self.check()

    def refuse_in_pass(self, what: str) -> None:
        """Raise CacheStateError while a thread is inside a pass; the pass is not disturbed."""
        step = self.open_pass
        if step is not None and step.is_running():
            where = "this thread" if step is active_step() else "another thread"
            raise CacheStateError(
                f"{what} was called in the middle of a forward pass of {where} with this cache, while some layers have "
                "the new tokens and others do not; do it before or after the pass, or give each thread a fork, made "
                "between passes"
            )

    def between_passes(self, what: str) -> None:
        """``ready`` before the change ``what``; CacheStateError while a pass is running."""
        self.refuse_in_pass(what)
        self.ready()

    @contextlib.contextmanager
    def changing(self, what: str, begun: int | None = None) -> Iterator[None]:
        """Mark the cache as torn while the block runs; an error or interrupt leaves it torn.

        CacheStateError if there were more than ``begun`` changes, after which this one was prepared.
        """
        with self._turn:
            self.between_passes(what)
            if begun is not None:
                self.refuse_unless(begun, what)
            self.torn = what
            self.changes += 1
        yield
        self.torn = None

    def empty(self, what: str) -> None:
        """Begin to remove all tokens, whatever is torn."""
        with self._turn:
            self.refuse_in_pass(what)
            self.torn = what
            self.changes += 1
            self.leave_pass()

    def enter_pass(self, step: Step, begun: int) -> None:
        """Enter this pass in the calling thread.

        CacheStateError if there were more than ``begun`` changes, after which the pass was prepared.
        """
        with self._turn:
            self.refuse_unless(begun, "a forward pass")
            self.changes += 1
            self.open_pass = step
        set_active_step(step)

    def refuse_unless(self, begun: int, what: str) -> None:
        """Raise CacheStateError if there were more than ``begun`` changes."""
        if self.changes != begun:
            raise CacheStateError(
                f"another thread began to change this cache at the same time as {what} of this one, which did nothing; "
                "give each thread a fork, made between passes"
            )

    def leave_pass(self) -> None:
        """Leave the pass of the calling thread; it can no longer be rolled back."""
        # In this order a pass that is interrupted in between is found and rolled back.
        if self.open_pass is not None and active_step() is self.open_pass:
            set_active_step(None)
        self.open_pass = None

    def end_interrupted_pass(self) -> None:
        """Roll back a pass that was interrupted in any thread."""
        if self.open_pass is not None and not self.open_pass.is_running():
            with self._turn:
                if self.open_pass is not None and not self.open_pass.is_running():
                    self.open_pass.abort()

    def __deepcopy__(self, memo: dict[int, Any]) -> ChangeGuard:
        twin = memo[id(self)] = ChangeGuard()
        twin.torn = self.torn
        return twin
