"""Detects that generate() of a patched model runs without the hooks of the patch."""

from __future__ import annotations

import warnings
from typing import Any


class Awaited:
    """Shared by a cache that generate() made and its layers; warns once if the hooks did not run."""

    def __init__(self, model_name: str):
        self._name, self._warned = model_name, False
        self.reached = False

    def filled_outside(self) -> None:
        """A layer got tokens in a pass without hooks."""
        if not self.reached and not self._warned:
            self._warned = True
            warnings.warn(
                f"generate() of the patched {self._name} does not reach the hooks of scout_hf, so that it attends to "
                "everything and counts nothing: it calls another model, was compiled before patch(), or the hooks were "
                "removed; patch the model that runs, after all other changes to it",
                stacklevel=2,
            )


def await_hooks(cache: Any, model_name: str) -> None:
    """Warn if the first pass with this ScoutCache is one without hooks."""
    cache.awaited = awaited = Awaited(model_name)
    for layer in cache.scout_layers:
        layer.awaited = awaited


def hooks_reached(cache: Any) -> None:
    """A pass with this ScoutCache ran the hooks."""
    if cache.awaited is not None:
        cache.awaited.reached, cache.awaited = True, None
