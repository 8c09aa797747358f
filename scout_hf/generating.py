"""The cache of ``generate()`` on a patched model: a ScoutCache where possible."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from scout_hf.awaited import await_hooks
from scout_hf.cache import ScoutCache
from scout_hf.compat.cache_names import CACHE, given_cache
from scout_hf.pass_hooks import PassHooks
from scout_hf.stock_passes import explain, reason_to_generate_with_stock

PREPARE = "_prepare_cache_for_generation"


class CacheForGenerate:
    """Replaces ``_prepare_cache_for_generation``: makes a ScoutCache, or the stock cache where that is not possible.

    Parameters
    ----------
    model : PreTrainedModel
        Without this replacement.
    new_cache : callable
        Makes an empty ScoutCache.
    hooks : PassHooks
    """

    # An object, not a closure: a deep copy of the model needs its own.
    def __init__(self, model: PreTrainedModel, new_cache: Callable[[], ScoutCache], hooks: PassHooks):
        self._model, self._new_cache, self._hooks = model, new_cache, hooks
        self._before = model.__dict__.get(PREPARE)

    def __call__(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        prepare = self._before or functools.partial(getattr(type(self._model), PREPARE), self._model)
        if self._hooks.running.ended:  # in a shallow copy of a model whose patch was removed
            return prepare(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        self._hooks.counters.pace.new_call()
        reason = reason_to_generate_with_stock(self._model, generation_config, model_kwargs)
        if reason is None and given_cache(model_kwargs) is None:
            model_kwargs[CACHE] = self._cache(generation_config, generation_mode)
            return None
        result = prepare(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        if reason is not None:
            explain(given_cache(model_kwargs), reason)
            self._hooks.stock_warnings.tell(reason)
        return result

    def _cache(self, generation_config: Any, generation_mode: Any) -> ScoutCache:
        cache = self._new_cache()
        await_hooks(cache, type(self._model).__name__)
        rolls_back = hasattr(cache, "activate_past_recording")
        if getattr(generation_config, "is_assistant", False) and rolls_back:
            cache.activate_past_recording()
        if generation_mode == GenerationMode.ASSISTED_GENERATION and not rolls_back:
            cache.keep_windows_whole()
        return cache
