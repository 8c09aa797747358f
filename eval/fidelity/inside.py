"""What selection and prediction do within the layers: a few decode steps under the fidelity monitor.

A pass of its own beside the one that is timed: watching takes longer than the steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

import scout_hf
from scout_hf.eval.fidelity.cells import METHODS, Cell

NAMES = ("mass", "output_error", "selection_error", "prediction_error", "block_recall")
"""Fields of :class:`scout_hf.stats.Fidelity` that are kept per layer."""


def inside(cell: Cell, model: PreTrainedModel, decode: Callable[[scout_hf.Handle], Any]) -> dict[str, Any]:
    """Means per layer of what the monitor saw while ``decode(handle)`` ran, by the names of ``NAMES``.

    Nothing of full attention, nor of other methods, which the monitor does not know.
    """
    config = None if cell.mode in METHODS else cell.config(monitor=1.0)
    if config is None:
        return {}
    with scout_hf.patch(model, config) as handle:
        decode(handle)
        found = [layer.fidelity for layer in handle.stats().layers]
    return {name: [layer and getattr(layer, name) for layer in found] for name in NAMES}
