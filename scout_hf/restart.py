"""Models that drop their cache and prefill again: LongRoPE changes the angles of all positions at a certain length."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from scout_hf.cache import ScoutCache
from scout_hf.compat.cache_names import CACHE, given_cache

PREPARE_INPUTS = "prepare_inputs_for_generation"


class RestartingInputs:
    """Replaces ``prepare_inputs_for_generation``: empties and refills a ScoutCache that the model drops.

    Phi-3, Phi-4 and PhiMoE drop the cache in the first pass beyond ``original_max_position_embeddings``, also in a long
    prompt. That pass would make a DynamicCache, and the rest of ``generate()`` would be stock.
    """

    # An object, not a closure: a deep copy of the model needs its own.
    def __init__(self, prepare: Callable[..., dict[str, Any]]):
        self._prepare = prepare

    @property
    def __signature__(self) -> inspect.Signature:
        """Signature of the replaced function, from which generate() reads the model's arguments."""
        return inspect.signature(self._prepare)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = self._prepare(*args, **kwargs)
        cache = given_cache(kwargs)
        if isinstance(cache, ScoutCache) and given_cache(inputs) is None:
            if kwargs.get("next_sequence_length") is not None:
                # Older releases pass only the newest token, as if the cache were still there.
                inputs = self._prepare(*args, **kwargs | {"next_sequence_length": None})
            cache.reset()
            inputs[CACHE] = cache
        return inputs
