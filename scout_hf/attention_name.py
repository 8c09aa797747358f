"""The name under which transformers finds scout_hf's attention: to all who read it, the name there was before."""

from __future__ import annotations

import weakref
from typing import Any, SupportsIndex

PREFIX = "scout_over_"


class AttentionName(str):
    """The implementation that a model had, which looks itself up as another.

    Models, masks, continuous batching, checks of settings and users read ``config._attn_implementation`` and decide by
    its text, which stays that of ``before``. A registry finds ``key`` under it, as dictionaries ask for the hash first;
    so does every other dictionary or set, which is why ``name in {"sdpa"}`` is False and ``name in ["sdpa"]`` is True.
    Copies and pickles are plain strings: a config taken from a patched model knows nothing of the patch. A shallow copy
    of that config has the very name, which stands for a patch in its own config alone, and reads as a plain string in
    every way once that patch is gone.

    Parameters
    ----------
    before : str or None
        The implementation of the config; models take None as eager.
    config : PreTrainedConfig
        The one that it is for.

    Attributes
    ----------
    patches : set of int
        Those of models that share the config, each by a number of its own.
    """

    __slots__ = ("_config", "hashes", "before", "key", "patches")

    before: str | None
    key: str
    patches: set[int]
    _config: weakref.ref[Any]
    hashes: tuple[int, int]

    def __new__(cls, before: str | None, config: Any) -> AttentionName:
        name = super().__new__(cls, before or "eager")
        name.before, name.key, name.patches = before, PREFIX + str(name), set()
        name._config = weakref.ref(config)
        name.hashes = hash(str(name)), hash(name.key)  # every layer asks, at every step
        return name

    def is_of(self, config: Any) -> bool:
        """Whether it is this very config's, not that of one which was copied."""
        return self._config() is config

    def __hash__(self) -> int:
        return self.hashes[1 if self.patches else 0]

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or (bool(self.patches) and self.key == other)

    def __ne__(self, other: object) -> bool:
        return str.__ne__(self, other) is not False and not (self.patches and self.key == other)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return (type(None), ()) if self.before is None else (str, (self.before,))


def name_over(config: Any) -> AttentionName:
    """The name for one patch more of a config, which is one of its ``patches`` once it is there."""
    current = config._attn_implementation_internal
    if not isinstance(current, AttentionName):
        return AttentionName(current, config)
    return current if current.is_of(config) else AttentionName(current.before, config)


def name_under(config: Any, patch: int) -> str | None:
    """What remains without this patch; all that somebody has set since stays."""
    current = config._attn_implementation_internal
    if not isinstance(current, AttentionName) or not current.is_of(config):
        return current
    current.patches.discard(patch)
    return current if current.patches else current.before
