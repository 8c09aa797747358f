"""Long-context decoding for HuggingFace Transformers: KV in host memory, sparse attention on GPU and CPU together.

>>> handle = scout_hf.patch(model, budget=2048)
>>> model.generate(**inputs, max_new_tokens=64)
>>> print(handle.stats())
>>> handle.remove()
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scout_hf.cache import ScoutCache
    from scout_hf.compat.cache_names import CACHE
    from scout_hf.config import ScoutConfig
    from scout_hf.errors import (
        CacheStateError,
        ConfigError,
        PatchError,
        SavingError,
        ScoutError,
        SessionError,
        UnsupportedInputError,
        UnsupportedModelError,
    )
    from scout_hf.patching import Handle, patch, unpatch
    from scout_hf.prefix.store import PrefixStore
    from scout_hf.recall_intervals import RecallIntervals
    from scout_hf.stats import Stats

__version__ = "0.2.0"

__all__ = [
    "CACHE",
    "CacheStateError",
    "ConfigError",
    "Handle",
    "PatchError",
    "PrefixStore",
    "RecallIntervals",
    "SavingError",
    "ScoutCache",
    "ScoutConfig",
    "ScoutError",
    "SessionError",
    "Stats",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "patch",
    "unpatch",
]

# Imported at first use: torch and transformers take seconds to import, which would slow down `scout-hf --help`.
_ROOMS = {"cache": "ScoutCache", "config": "ScoutConfig", "recall_intervals": "RecallIntervals", "stats": "Stats"}
_HOME = {name: room for room, name in _ROOMS.items()} | dict.fromkeys(("Handle", "patch", "unpatch"), "patching")
_HOME |= {"CACHE": "compat.cache_names", "PrefixStore": "prefix.store"}


# In a checkout, patches/ and eval/ lie beside this folder; Python finds it before the installed package.
_CHECKOUT = Path(__file__).parents[1]
if all((_CHECKOUT / name).is_file() for name in ("setup.py", "patches/registry.py", "eval/__init__.py")):
    __path__.append(str(_CHECKOUT))


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
