"""When a layer recalls blocks that the CPU attends to the device."""

from __future__ import annotations

import numpy as np

from scout_hf.recall_intervals import RecallIntervals


class RecallPolicy:
    """One layer's recall rule: a threshold per step on the CPU's share of the chosen blocks.

    Parameters
    ----------
    rule : float, int, RecallIntervals or None
        ``ScoutConfig.recall``.
    layer_idx : int

    Attributes
    ----------
    steps : int
        Decode steps since the residents were loaded.
    """

    def __init__(self, rule: float | int | RecallIntervals | None, layer_idx: int):
        self.rule = rule.intervals[layer_idx] if isinstance(rule, RecallIntervals) else rule
        self.layer_idx, self.steps = layer_idx, 0

    def next(self, tokens: int) -> float | None:
        """The threshold for the next step; None if it does not recall.

        Layers that drift alike would recall in the same steps and compete for the link. So the threshold alternates
        between 0.75 and 1.25 times the rule, shifted by layer, and intervals have a phase that depends on the layer.

        Parameters
        ----------
        tokens : int
            Context length of the step.
        """
        self.steps += 1
        if self.rule is None:
            return None
        if isinstance(self.rule, float):
            # Rounded to float32, in which a captured step compares.
            return float(np.float32(self.rule * (0.75 if (tokens + self.layer_idx) % 2 else 1.25)))
        return 0.0 if self.rule > 0 and (self.steps + self.layer_idx) % self.rule == 0 else None
