"""Running forward passes of one patched model: removing the patch waits for them."""

from __future__ import annotations

import threading
import time
import weakref

from scout_hf.errors import PatchError
from scout_hf.step import Step

_LOOK_EVERY_S = 0.0005


class RunningPasses:
    """Running forward passes in all threads, and whether new ones may start.

    If hooks were removed during a pass, some of its layers would attend through the cache, and others with stock
    attention over the new tokens only.

    Attributes
    ----------
    ended : bool
        The patch is being removed or was removed: a pass that starts now runs stock attention in all layers.
    """

    def __init__(self) -> None:
        self.ended = False
        self._lock = threading.Lock()
        # Weak references: a pass that was interrupted never calls leave().
        self._steps: weakref.WeakValueDictionary[int, Step] = weakref.WeakValueDictionary()

    def __reduce__(self) -> tuple[type[RunningPasses], tuple[()]]:
        return RunningPasses, ()  # a copied model starts with none

    def enter(self, step: Step) -> bool:
        """Add a pass that starts; False if the patch is being removed."""
        with self._lock:
            if not self.ended:
                self._steps[id(step)] = step
            return not self.ended

    def leave(self, step: Step) -> None:
        """Remove a pass that ended or was rolled back."""
        with self._lock:
            self._steps.pop(id(step), None)

    def end(self) -> None:
        """Let no more passes start, and wait for those in other threads.

        Raises
        ------
        PatchError
            Inside a pass of the calling thread; the pass and the patch are not changed.
        """
        with self._lock:
            before, self.ended = self.ended, True
            steps = list(self._steps.values())
        try:
            for step in steps:
                if step.is_running_here():
                    raise PatchError(
                        "a forward pass of this model is running and removes its own patch (in a hook?); "
                        "remove it before the pass or after it"
                    )
                while step.is_running():
                    time.sleep(_LOOK_EVERY_S)
        except BaseException:
            self.ended = before
            raise
