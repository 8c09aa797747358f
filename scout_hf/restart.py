"""Models that drop their cache to begin again: LongRoPE changes the angles of all positions at a length."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from scout_hf.cache import ScoutCache
from scout_hf.compat.cache_names import CACHE, given_cache

PREPARE_INPUTS = "prepare_inputs_for_generation"


class RestartingInputs:
    """``prepare_inputs_for_generation`` under which a ScoutCache that the model drops is emptied and filled again.

    Phi-3, Phi-4 and PhiMoE leave out the cache of the pass that first goes beyond
    ``original_max_position_embeddings``, a long prompt's as well; the pass would make a DynamicCache, and the rest of
    ``generate()`` would be stock.
    """

    # An object, not a closure: a copy of the model must prepare for itself.
    def __init__(self, prepare: Callable[..., dict[str, Any]]):
        self._prepare = prepare

    @property
    def __signature__(self) -> inspect.Signature:
        """generate() reads what a model takes off this function."""
        return inspect.signature(self._prepare)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = self._prepare(*args, **kwargs)
        cache = given_cache(kwargs)
        if isinstance(cache, ScoutCache) and given_cache(inputs) is None:
            if kwargs.get("next_sequence_length") is not None:
                # Older releases go on with the newest token alone, as if the cache were still there.
                inputs = self._prepare(*args, **kwargs | {"next_sequence_length": None})
            cache.reset()
            inputs[CACHE] = cache
        return inputs
