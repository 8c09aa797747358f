"""InfiniGen on random weights, its choice of tokens drifting as in a real text: random weights have no such drift."""

from __future__ import annotations

import torch

from scout_hf.methods import InfiniGen, method_names, register_method

NAME = "drifting-infinigen"


class DriftingInfiniGen(InfiniGen):
    """Chooses as many tokens as the real scores say, at their cost; which ones is a window over shuffled tokens.

    ``share`` of a head's tokens, the same for all objects, leaves and comes in a step: set it before decoding.
    """

    name = NAME
    share = 0.1

    _shuffled: torch.Tensor | None = None
    _first = 0

    def choose_tokens(self, step, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids, usable = super().choose_tokens(step, query)
        if self._shuffled is None:
            self._shuffled = torch.rand(
                (*ids.shape[:2], self.kv.host.length), dtype=torch.float32, device=ids.device
            ).argsort(-1)
        held, count = self._shuffled.shape[2], ids.shape[2]
        self._first += round(self.share * count)
        window = (self._first + torch.arange(min(count, held), dtype=torch.int64, device=ids.device)) % held
        return self._shuffled[:, :, window], usable[:, :, : len(window)]


def drifting_infinigen() -> str:
    """The name of that method; registered if it was not."""
    if NAME not in method_names():
        register_method(DriftingInfiniGen)
    return NAME
