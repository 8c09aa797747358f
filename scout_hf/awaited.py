"""A cache that generate() of a patched model made, and that no forward pass with its hooks has used yet."""

from __future__ import annotations

import warnings
from typing import Any


class Awaited:
    """Shared by a cache and its layers; says once that hooks did not run."""

    def __init__(self, model_name: str):
        self._name, self._told = model_name, False
        self.reached = False

    def filled_outside(self) -> None:
        """A layer got tokens in a pass that no hook has opened."""
        if not self.reached and not self._told:
            self._told = True
            warnings.warn(
                f"generate() of the patched {self._name} does not reach the hooks of scout_hf, so that it attends to "
                "everything and nothing is counted: something calls another model, was compiled before patch(), or has "
                "removed the hooks; patch the very model that runs, after all other changes to it",
                stacklevel=2,
            )


def await_hooks(cache: Any, model_name: str) -> None:
    """Warn if the first pass with this ScoutCache is one without hooks."""
    cache.awaited = awaited = Awaited(model_name)
    for layer in cache.scout_layers:
        layer.awaited = awaited


def hooks_reached(cache: Any) -> None:
    """A pass with this ScoutCache has come to the hooks."""
    if cache.awaited is not None:
        cache.awaited.reached, cache.awaited = True, None
