"""What ``draft=`` takes, and with which settings drafts are possible."""

from __future__ import annotations

from scout_hf.config import ScoutConfig
from scout_hf.errors import ConfigError
from scout_hf.methods.base import find_method, method_names

MOST = 16
"""Tokens per draft with ``draft=True``, at most."""


def most_drafts(draft: bool | int | None, config: ScoutConfig, reason: str | None = None) -> int:
    """Most tokens to draft before a check; 0 for no drafts.

    Parameters
    ----------
    draft : bool, int or None
    config : ScoutConfig
    reason : str or None
        Why keys and values of this model depend on more than the tokens before them.

    Raises
    ------
    ConfigError
        For other values of ``draft``, and for settings without a sparse step or without an exact one.
    """
    if draft is None or draft is False:
        return 0
    if draft is not True and (not isinstance(draft, int) or draft < 1):
        raise ConfigError(
            f"draft={draft!r} is not allowed: draft takes True, the most tokens to draft before each exact pass (1 or "
            "more), or None for no drafts; try True"
        )
    given = f"draft={draft!r} is not possible with "
    if not find_method(config.method).can_draft:
        able = ", ".join(repr(name) for name in method_names() if find_method(name).can_draft)
        raise ConfigError(
            f"{given}method={config.method!r}, which has no sparse steps beside exact passes; methods that have both "
            f"are {able}; try method='scout', with split='cpu' for two tiers without a GPU"
        )
    if config.attends_all:
        raise ConfigError(
            f"{given}budget={config.budget!r}, which leaves no sparse steps to draft with, and is exact already; leave "
            "draft out, or give the drafts a budget, such as budget='auto' or 2048"
        )
    if config.host_dtype is not None:
        raise ConfigError(
            f"{given}host_dtype={config.host_dtype!r}, which rounds keys and values, so that no pass is exact; use "
            "host_dtype=None"
        )
    if config.hand_over == "graph":
        raise ConfigError(f"{given}hand_over='graph', which captures sparse steps alone; use hand_over='flags'")
    if reason is not None:
        raise ConfigError(f"draft={draft!r} is not possible with this model: {reason}; leave draft out")
    return MOST if draft is True else draft
