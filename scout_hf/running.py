"""Forward passes under way through one patch: taking the patch away waits for them."""

from __future__ import annotations

import threading
import time
import weakref

from scout_hf.errors import PatchError
from scout_hf.step import Step

_LOOK_EVERY_S = 0.0005


class RunningPasses:
    """Which passes run, in any thread, and whether new ones may begin.

    A pass whose hooks vanish in the middle would attend with some layers here and some by stock attention.

    Attributes
    ----------
    ended : bool
        Whether the patch is being taken away, or gone: a pass that begins now is stock's, from its first layer on.
    """

    def __init__(self):
        self.ended = False
        self._lock = threading.Lock()
        # Weakly: one that an interrupt left is never told of.
        self._steps: weakref.WeakValueDictionary[int, Step] = weakref.WeakValueDictionary()

    def __reduce__(self):
        return RunningPasses, ()  # those of a copied model are its own

    def enter(self, step: Step) -> bool:
        """Note a pass that begins; False if none may."""
        with self._lock:
            if not self.ended:
                self._steps[id(step)] = step
            return not self.ended

    def leave(self, step: Step) -> None:
        """A pass got through, or was taken back."""
        with self._lock:
            self._steps.pop(id(step), None)

    def end(self) -> None:
        """Let no pass begin, and wait for those in other threads.

        Raises
        ------
        PatchError
            In a pass of the calling thread, which goes on as if nothing had been asked.
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
