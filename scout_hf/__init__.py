"""Long-context decoding for HuggingFace Transformers: KV in host memory, sparse attention on GPU and CPU together.

>>> handle = scout_hf.patch(model, budget=2048)
>>> model.generate(**inputs, max_new_tokens=64)
>>> print(handle.stats())
>>> handle.remove()
"""

from scout_hf.cache import ScoutCache
from scout_hf.config import ScoutConfig
from scout_hf.errors import (
    CacheStateError,
    ConfigError,
    PatchError,
    ScoutError,
    UnsupportedInputError,
    UnsupportedModelError,
)
from scout_hf.patching import Handle, patch, unpatch
from scout_hf.recall import RecallIntervals
from scout_hf.telemetry import Stats

__version__ = "0.1.0"

__all__ = [
    "CacheStateError",
    "ConfigError",
    "Handle",
    "PatchError",
    "RecallIntervals",
    "ScoutCache",
    "ScoutConfig",
    "ScoutError",
    "Stats",
    "UnsupportedInputError",
    "UnsupportedModelError",
    "patch",
    "unpatch",
]
