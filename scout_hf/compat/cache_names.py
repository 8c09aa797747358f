"""What transformers calls the KV cache among a model's arguments and outputs: another word since 5.24."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import GenerationMixin

NEW, OLD = "cache", "past_key_values"
CACHE = NEW if NEW in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else OLD
"""The name that the installed release uses itself: ``model(ids, **{CACHE: cache})``, ``output[CACHE]``."""
# A name that models of an older release would take without a look at it.
UNREAD = NEW if CACHE == OLD else None


def given_cache(arguments: dict[str, Any]) -> Any:
    """The cache among the named arguments of a call, under any name that the installed release takes, or None.

    Newer releases still take the old name, unless the new one is there too, and change it within ``forward``, where
    hooks do not see it.
    """
    return arguments.get(CACHE if CACHE in arguments else OLD)
