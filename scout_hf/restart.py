"""Models that drop their cache and prefill again: LongRoPE changes the angles of all positions at a certain length."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch

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
        cache = given_cache(kwargs)
        if isinstance(cache, ScoutCache) and kwargs.get("is_first_iteration") and args:
            _tell_of_other_ids(cache, args[0], kwargs.get("next_sequence_length"))
        inputs = self._prepare(*args, **kwargs)
        if isinstance(cache, ScoutCache) and given_cache(inputs) is None:
            if kwargs.get("next_sequence_length") is not None:
                # Older releases pass only the newest token, as if the cache were still there.
                inputs = self._prepare(*args, **kwargs | {"next_sequence_length": None})
            cache.reset()
            inputs[CACHE] = cache
        return inputs


def _tell_of_other_ids(cache: ScoutCache, ids: Any, new: int | None) -> None:
    """Warn where the tokens in a cache are known not to be those that a call says they are."""
    held = cache.get_seq_length()
    # Without ``new``, the ids are only those that are not in the cache.
    if not held or new is None or not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] < held:
        return
    known = cache.log.held(held, cache.guard.changes)
    if known is None or known.ids.shape[0] != ids.shape[0]:
        return
    wrong = known.ids != ids[:, :held].cpu()
    other = (wrong if known.mask is None else wrong & known.mask).any(0).nonzero()
    if len(other):
        warnings.warn(
            f"the cache holds other tokens than the ids that generate() was given, from token {int(other[0])} on; the "
            "answer follows those in the cache. Crop it there, or start with a new one",
            RuntimeWarning,
            stacklevel=3,
        )
