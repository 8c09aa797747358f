"""How many tokens to compute anew: the cost model of KVPR (arXiv 2411.17089, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Rates:
    """Seconds per token of all rows of one layer.

    Attributes
    ----------
    input_s, kv_s : float
        For its inputs, and for its keys and values, to cross the link.
    compute_s : float
        For keys and values to be made from the inputs.
    """

    input_s: float
    kv_s: float
    compute_s: float

    def computed(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens in that time."""
        self.compute_s += 0.2 * (seconds / tokens - self.compute_s)


def step_seconds(rates: Rates, tokens: int, split: int) -> float:
    """What a layer takes when the first ``split`` of its ``tokens`` are computed anew: inputs come first."""
    return split * rates.input_s + max(split * rates.compute_s, (tokens - split) * rates.kv_s)


def best_split(rates: Rates, tokens: int, most: int) -> int:
    """The split of least :func:`step_seconds`, at most ``most``.

    Up to where computing takes as long as the rest of the transfer every token gains ``kv_s - input_s``; from there on
    every token costs.
    """
    if rates.input_s >= rates.kv_s:
        return 0
    crossing = tokens * rates.kv_s / (rates.compute_s + rates.kv_s)
    return min(most, int(crossing))
