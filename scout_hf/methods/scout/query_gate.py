"""Whether CPU attention may use a layer's predicted queries, decided by their past error."""

from __future__ import annotations

import math

import torch

from scout_hf.fusion import Partial
from scout_hf.stores.state import State, count_in, maybe_number_in
from scout_hf.stores.streams import Mark

CHECK_EVERY = 4
# Relative error of the layer's output, mean over rows and heads. Block selection alone causes about as much.
TOLERATED = 0.05


class QueryGate:
    """One layer's choice between predicted and real query for CPU attention.

    ``auto`` compares both in the first step with CPU attention, and in every 4th step; between steps that are replayed
    as a graph, in every 64th. The predicted query is used while it changes the layer's output by at most 5 %;
    otherwise, and in steps that compare, the real one.

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

    @property
    def predicts(self) -> bool:
        """Whether steps that do not compare start CPU attention early, with the predicted query."""
        if self.rule != "auto":
            return self.rule == "predicted"
        if self._coming is not None and self._coming[1].done():
            self._learn(float(self._coming[0]))
            self._coming = None
        return self.error is not None and self.error <= TOLERATED

    def in_prediction(self, compare: bool = False) -> bool:
        """At the start of a step: whether to start CPU attention early, with the predicted query.

        Parameters
        ----------
        compare : bool
            Compare in this step, whether its turn has come or not.
        """
        if self.rule != "auto":
            return self.rule == "predicted"
        predicts = self.predicts
        self.checking = compare or self.error is None or self._steps % CHECK_EVERY == 0
        self._steps += 1
        return predicts and not self.checking

    def judge(self, real: Partial, predicted: Partial) -> None:
        """Update the error from the outputs of both queries; on a GPU asynchronously."""
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

    def state_dict(self) -> State:
        """What was learnt."""
        if self._coming is not None:
            self._coming[1].finish()
            self._learn(float(self._coming[0]))
            self._coming = None
        return {"error": self.error, "steps": self._steps}

    def load_state_dict(self, state: State) -> None:
        """Take what :meth:`state_dict` gave; SessionError if it does not fit."""
        self.error, self._steps = maybe_number_in(state, "error"), count_in(state, "steps")

    def fork(self) -> QueryGate:
        """An independent copy."""
        twin = QueryGate(self.rule)
        twin.__dict__.update(self.__dict__)
        return twin
