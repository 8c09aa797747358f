"""The name under which transformers finds scout_hf's attention: to all who read it, the name there was before."""

from __future__ import annotations

PREFIX = "scout_over_"


class AttentionName(str):
    """The implementation that a model had, which looks itself up as another.

    Models, masks, continuous batching, checks of settings and users read ``config._attn_implementation`` and decide by
    its text, which stays that of ``before``. A registry finds ``key`` under it, as dictionaries ask for the hash first.
    Copies and pickles are plain strings: a config taken from a patched model knows nothing of the patch.

    Parameters
    ----------
    before : str or None
        The implementation of the config; models take None as eager.
    patches : int
        Patches of models that share the config.
    """

    __slots__ = ("before", "key", "patches")

    def __new__(cls, before: str | None, patches: int = 1) -> AttentionName:
        name = super().__new__(cls, before or "eager")
        name.before, name.key, name.patches = before, PREFIX + str(name), patches
        return name

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and (str.__eq__(self, other) or str.__eq__(self.key, other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce_ex__(self, protocol: int) -> tuple:
        return (type(None), ()) if self.before is None else (str, (self.before,))


def name_over(current: str | None) -> AttentionName:
    """The name for one patch more of a config whose implementation is ``current``."""
    if isinstance(current, AttentionName):
        return AttentionName(current.before, current.patches + 1)
    return AttentionName(current)


def name_under(current: str | None) -> str | None:
    """What remains of ``current`` for one patch less; all that somebody has set since stays."""
    if not isinstance(current, AttentionName):
        return current
    return current.before if current.patches == 1 else AttentionName(current.before, current.patches - 1)
