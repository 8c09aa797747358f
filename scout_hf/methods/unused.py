"""The warning about settings that the chosen method does not use."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable

import torch

from scout_hf.config import ScoutConfig
from scout_hf.methods.base import find_method, method_names

ALWAYS = frozenset({"method", "method_options", "fused"})


def unused_settings(config: ScoutConfig, device: torch.device, drafting: bool = False) -> list[str]:
    """Settings that were changed from their default, and have no effect for a model on ``device``.

    Parameters
    ----------
    config : ScoutConfig
    device : torch.device
        The model's device.
    drafting : bool
        Whether sparse steps draft, as with ``patch(draft=True)``.

    Returns
    -------
    list of str
        Empty if the method does not declare which settings it uses.

    Examples
    --------
    >>> import torch
    >>> from scout_hf import ScoutConfig
    >>> from scout_hf.methods import unused_settings
    >>> unused_settings(ScoutConfig(method="dense", budget=512), torch.device("cpu"))
    ['budget']
    """
    kind = find_method(config.method)
    used = kind.used_settings(config, device)
    if used is None:
        return []
    if drafting and kind.can_draft:
        used |= kind.uses_in_drafts
    changed = [field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default]
    return [name for name in changed if name not in used | ALWAYS]


def warn_of_unused(
    config: ScoutConfig, device: torch.device, stacklevel: int, among: Iterable[str] = (), drafting: bool = False
) -> None:
    """Warn once about all settings without effect; with ``among``, about those of these names.

    Parameters
    ----------
    config : ScoutConfig
    device : torch.device
        The model's device.
    stacklevel : int
        As for ``warnings.warn``, seen from the caller.
    among : iterable of str
        Names to look at; by default all.
    drafting : bool
        Whether sparse steps draft.
    """
    unused = [name for name in unused_settings(config, device, drafting) if not among or name in among]
    if not unused:
        return
    given = ", ".join(f"{name}={getattr(config, name)!r}" for name in unused)
    has, them = ("has", "it") if len(unused) == 1 else ("have", "them")
    where = f"method={config.method!r}, split={config.split!r} and a model on {device.type!r}"
    message = f"{given} {has} no effect with {where}: leave {them} out"
    if ways := _ways_to_use(config, device, set(unused)):
        message += f", or set {' or '.join(ways)}, which uses {them}"
    warnings.warn(message, UserWarning, stacklevel + 1)


def _ways_to_use(config: ScoutConfig, device: torch.device, names: set[str]) -> list[str]:
    """Other settings with which all of ``names`` have an effect."""
    own, ways = find_method(config.method), []
    if own.can_draft and names <= own.uses_in_drafts | (own.used_settings(config, device) or set()):
        ways.append("draft=True")
    for split in ("auto", "cpu"):
        if names <= (own.used_settings(dataclasses.replace(config, split=split), device) or set()):
            return [f"split={split!r}"]
    others = [name for name in method_names() if name != config.method]
    return ways + [
        f"method={name!r}" for name in others if names <= (find_method(name).used_settings(config, device) or set())
    ]
