"""Why a forward pass of a patched model runs stock attention, for ``stats()`` and a warning."""

from __future__ import annotations

import warnings
from typing import Any

from scout_hf.cache import ScoutCache
from scout_hf.compat.cache_names import NEW, given_cache

_REASON = "_scout_stock_reason"
_BATCHING = "PagedAttentionCache"
_NONE, _UNUSED = "no cache was given", "use_cache=False"
_MADE = "use_cache=True without a cache makes a DynamicCache"
_UNUSED_BY_DEFAULT = "use_cache=False in the model's generation_config"
MEANT = (_NONE, _UNUSED)
"""Reasons that the caller chose, such as a call without a cache; no warning."""


def reason_to_generate_with_stock(model: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> str | None:
    """Why this ``generate()`` uses no ScoutCache; None if it makes one or was given one."""
    given = given_cache(model_kwargs)
    if given is not None:
        return None if isinstance(given, ScoutCache) else _given(given)
    if generation_config.use_cache is False:
        # The call has a config of its own, even if nothing was given.
        return _UNUSED_BY_DEFAULT if model.generation_config.use_cache is False else _UNUSED
    if generation_config.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation={generation_config.cache_implementation!r}"
    if generation_config.output_attentions:
        return "output_attentions=True"
    return None if model._supports_default_dynamic_cache() else f"{type(model).__name__} takes no DynamicCache"


class StockWarnings:
    """Warns, once for each reason, that a patched model runs stock attention."""

    def __init__(self, model_name: str):
        self._name = model_name
        self._warned: set[str] = set()

    def tell(self, reason: str) -> None:
        """Warn; the warning names the line that called the caller."""
        if reason in MEANT or reason in self._warned:
            return
        self._warned.add(reason)
        warnings.warn(
            f"this call of the patched {self._name} runs stock attention: {reason}. Its output is right, but scout_hf "
            "is not used. To use it, leave that out, or pass handle.new_cache(). This warning comes once; "
            "handle.stats() counts such passes",
            stacklevel=3,
        )


def explain(cache: Any, reason: str) -> None:
    """Count passes with this cache under ``reason``."""
    if cache is not None:
        setattr(cache, _REASON, reason)


def reason_of_pass(given: dict[str, Any]) -> str:
    """The reason under which a forward pass without a ScoutCache is counted, from its named arguments."""
    # Continuous batching uses this name in all releases.
    cache = given_cache(given) if given.get(NEW) is None else given[NEW]
    if (reason := getattr(cache, _REASON, None)) is not None:
        return reason
    if cache is not None:
        return _given(cache)
    if given.get("output_attentions"):
        return "output_attentions=True"
    if given.get("use_cache"):
        return _MADE
    return _UNUSED if given.get("use_cache") is False else _NONE


def _given(cache: Any) -> str:
    if type(cache).__name__ == _BATCHING:
        return "continuous batching keeps a cache of its own"
    return f"a {type(cache).__name__} was given"
