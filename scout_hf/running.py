"""Running forward passes of one patched model: removing the patch waits for them."""

from __future__ import annotations

import threading
import time
import weakref

from scout_hf.errors import PatchError
from scout_hf.step import Step

_LOOK_EVERY_S = 0.0005


class RunningPasses:
    """Which passes run, in any thread, and whether new ones may start.

    If hooks were removed in the middle of a pass, some of its layers would attend through the cache and some by stock
    attention over the new tokens alone.

    Attributes
    ----------
    ended : bool
        Whether the patch is being removed, or is gone: a pass that starts now runs stock attention in all layers.
    """

    def __init__(self) -> None:
        self.ended = False
        self._lock = threading.Lock()
        # Weak, since a pass that was interrupted never calls leave().
        self._steps: weakref.WeakValueDictionary[int, Step] = weakref.WeakValueDictionary()

    def __reduce__(self) -> tuple[type[RunningPasses], tuple[()]]:
        return RunningPasses, ()  # those of a copied model are its own

    def enter(self, step: Step) -> bool:
        """Register a pass that starts; False if the patch is being removed."""
        with self._lock:
            if not self.ended:
                self._steps[id(step)] = step
            return not self.ended

    def leave(self, step: Step) -> None:
        """A pass has ended, or was rolled back."""
        with self._lock:
            self._steps.pop(id(step), None)

    def end(self) -> None:
        """Let no pass start, and wait for those in other threads.

        Raises
        ------
        PatchError
            Inside a pass of the calling thread; that pass and the patch stay as they are.
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
