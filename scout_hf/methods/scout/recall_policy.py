"""When a layer recalls: brings blocks that it wants and the CPU attends back to the device."""

from __future__ import annotations

import numpy as np

from scout_hf.recall_intervals import RecallIntervals


class RecallPolicy:
    """One layer's rule, as a share of the CPU: a step recalls in which the CPU has at least so much of what is chosen.

    Parameters
    ----------
    rule : float, int, RecallIntervals or None
        ``ScoutConfig.recall``.
    layer_idx : int

    Attributes
    ----------
    steps : int
        Decode steps since residents were chosen.
    """

    def __init__(self, rule: float | int | RecallIntervals | None, layer_idx: int):
        self.rule = rule.intervals[layer_idx] if isinstance(rule, RecallIntervals) else rule
        self.layer_idx, self.steps = layer_idx, 0

    def next(self, tokens: int) -> float | None:
        """The share for one more step, which makes a context of so many tokens; None if it does not recall at all.

        Layers that drift alike would all recall in the same steps, and wait for a link that is idle in the others: a
        share is lower and higher than the rule's by turns, layer by layer, and intervals have different phases.
        """
        self.steps += 1
        if self.rule is None:
            return None
        if isinstance(self.rule, float):
            # Rounded as on a device, where a captured step compares in float32.
            return float(np.float32(self.rule * (0.75 if (tokens + self.layer_idx) % 2 else 1.25)))
        return 0.0 if self.rule > 0 and (self.steps + self.layer_idx) % self.rule == 0 else None
