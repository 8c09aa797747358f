"""The name under which transformers finds scout_hf's attention, and that reads as the model's previous one."""

from __future__ import annotations

import weakref
from typing import Any, SupportsIndex

from scout_hf.step import active_step

PREFIX = "scout_over_"


class AttentionName(str):
    """A string that reads as the previous implementation and hashes as the name of scout_hf's attention.

    Models, masks and users compare ``config._attn_implementation`` with other strings, so its text stays that of
    ``before``. Dictionaries compare hashes first, so a registry finds ``key``. Hence ``name in {"sdpa"}`` is False and
    ``name in ["sdpa"]`` is True. Deep copies and pickles are plain strings: a config copied from a patched model is
    stock. A shallow copy of the config shares this object, which means a patch in its own config only, and behaves as a
    plain string once that patch is removed.

    Models with an indexer make a mask of its choice for the implementations that are known to need one, and hand the
    choice itself to all others. In a pass with a ScoutCache of such a model the name reads as none that is known.

    Parameters
    ----------
    before : str or None
        The previous implementation; None means eager.
    config : PreTrainedConfig
        The config that this name is for.

    Attributes
    ----------
    patches : set of int
        Patches of the models that share the config, by id.
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
        name.hashes = hash(str(name)), hash(name.key)  # looked up by every layer in every step
        return name

    def is_of(self, config: Any) -> bool:
        """Whether it was made for this config, not for the one that this was copied from."""
        return self._config() is config

    def __hash__(self) -> int:
        return self.hashes[1 if self.patches else 0]

    def __eq__(self, other: object) -> bool:
        if not self.patches:
            return str.__eq__(self, other) is True
        return (str.__eq__(self, other) is True and not _asks_for_choice()) or self.key == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return (type(None), ()) if self.before is None else (str, (self.before,))


def _asks_for_choice() -> bool:
    step = active_step()
    return step is not None and step.cache.asks_for_choice


def name_over(config: Any) -> AttentionName:
    """The name for one more patch of a config; the caller adds the patch to ``patches``."""
    current = config._attn_implementation_internal
    if not isinstance(current, AttentionName):
        return AttentionName(current, config)
    return current if current.is_of(config) else AttentionName(current.before, config)


def name_under(config: Any, patch: int) -> str | None:
    """The implementation without this patch; a name that was set after the patch stays."""
    current = config._attn_implementation_internal
    if not isinstance(current, AttentionName) or not current.is_of(config):
        return current
    current.patches.discard(patch)
    return current if current.patches else current.before
