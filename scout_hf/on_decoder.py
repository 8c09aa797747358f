"""The changes of a patch to a model's decoder: fewer launches in its modules, and captured steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scout_hf.changes import Attribute
from scout_hf.config import ScoutConfig
from scout_hf.fused import changes_of_fused
from scout_hf.graph import StepGraphs


def changes_of_decoder(decoder: Any, config: ScoutConfig) -> Iterator[Attribute]:
    """The changes, in order; each is made before the next one is asked for."""
    yield from changes_of_fused(decoder, config)
    if config.hand_over == "graph":
        yield Attribute(decoder, "forward", StepGraphs(decoder.forward, decoder.config), keep_others=True)
