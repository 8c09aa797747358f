"""Which caches of a model are alive, and how many bytes they hold together."""

from __future__ import annotations

import weakref
from typing import Any

from scout_hf.stores.counted import each_pool_once


class AliveCaches:
    """Weak references to the caches that a patched model has used, and to their forks."""

    def __init__(self) -> None:
        self._caches: dict[int, weakref.ref[Any]] = {}

    def add(self, cache: Any) -> None:
        """Add a ScoutCache; only a weak reference is kept."""
        key = id(cache)
        if key not in self._caches:
            caches = self._caches
            caches[key] = weakref.ref(cache, lambda _: caches.pop(key, None))
            cache.seen_by = weakref.ref(self)

    def held(self) -> tuple[int, dict[str, int]]:
        """How many caches hold tokens, and their bytes by tier; a page that forks share counts once."""
        alive = [cache for cache in (known() for known in list(self._caches.values())) if cache is not None]
        # copy.copy of a cache shares its layers.
        alive = list({id(cache.layers): cache for cache in alive}.values())
        total: dict[str, int] = {}
        with each_pool_once():
            each = [cache.tier_bytes() for cache in alive if cache.is_initialized]
        for held in each:
            for tier, amount in held.items():
                total[tier] = total.get(tier, 0) + amount
        return len(each), total

    def __reduce__(self) -> tuple[Any, ...]:
        return AliveCaches, ()
