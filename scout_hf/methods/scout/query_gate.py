"""Whether the CPU may attend with a layer's predicted queries, from how far off they have been."""

from __future__ import annotations

import math

import torch

from scout_hf.fusion import Partial
from scout_hf.stores.streams import Mark

CHECK_EVERY = 4
# Relative error of the layer's output, mean over rows and heads. Selection alone costs about as much.
TOLERATED = 0.05


class QueryGate:
    """One layer's rule for the query of the CPU's share.

    ``auto`` compares both queries in the first step in which the CPU has a share, and in every 4th of all: while the
    predicted one would change the layer's output by no more than a twentieth, it is used; otherwise, and in the steps
    that compare, the real one.

    Parameters
    ----------
    rule : {"auto", "predicted", "real"}
        ``ScoutConfig.cpu_query``.
    """

    def __init__(self, rule: str):
        self.rule, self.checking = rule, False
        self.error: float | None = None
        self._steps = 0
        self._coming: tuple[torch.Tensor, Mark] | None = None

    def in_prediction(self) -> bool:
        """At the start of a step, before the real query is known: whether to start with the predicted one."""
        if self.rule != "auto":
            return self.rule == "predicted"
        if self._coming is not None and self._coming[1].done():
            self._learn(float(self._coming[0]))
            self._coming = None
        self.checking = self.error is None or self._steps % CHECK_EVERY == 0
        self._steps += 1
        return not self.checking and self.error is not None and self.error <= TOLERATED

    def judge(self, real: Partial, predicted: Partial) -> None:
        """Learn from a step attended with both, out (batch, query_heads, 1, head_dim) each; on a GPU a little later."""
        size = real.out.float().norm(dim=-1).clamp(min=1e-30)
        error = ((predicted.out - real.out).float().norm(dim=-1) / size).mean()
        if error.is_cuda:
            here = torch.empty((), dtype=error.dtype, device="cpu", pin_memory=True)
            here.copy_(error, non_blocking=True)
            self._coming = here, Mark(torch.cuda.current_stream(error.device).record_event())
        else:
            self._learn(float(error))

    def _learn(self, error: float) -> None:
        if math.isfinite(error):
            self.error = error if self.error is None else (self.error + error) / 2

    def fork(self) -> QueryGate:
        """An independent copy."""
        twin = QueryGate(self.rule)
        twin.__dict__.update(self.__dict__)
        return twin
