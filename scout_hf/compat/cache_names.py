"""The name of the KV cache among a model's arguments and outputs, which changed in transformers 5.24."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin

NEW, OLD = "cache", "past_key_values"
CACHE = NEW if NEW in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else OLD
"""The cache's name in the installed release: ``model(ids, **{CACHE: cache})``, ``output[CACHE]``."""
# A name that models of an older release accept and ignore.
UNREAD = NEW if CACHE == OLD else None


def given_cache(arguments: dict[str, Any]) -> Any:
    """The cache among the named arguments of a call, under any name that the installed release accepts.

    Newer releases accept the old name if the new one is not given, and rename it inside ``forward``, after the hooks.

    Parameters
    ----------
    arguments : dict
        Arguments of the model by name.

    Returns
    -------
    Cache or None

    Examples
    --------
    >>> given_cache({"past_key_values": cache}) is cache
    True
    """
    return arguments.get(CACHE if CACHE in arguments else OLD)
