"""How many tokens to recompute: the cost model of KVPR (arXiv 2411.17089, section 3.2), one layer ahead.

The paper lets a layer's transfers begin with the layer: inputs first, then the rest beside the computing,
``l * input_s + max(l * compute_s, (n - l) * kv_s)``. Here they begin one layer before, so that in the long run link and
device are both busy all the time, and a layer takes as long as the slower one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

NEW_SHARE = 0.2


@dataclass
class Rates:
    """Seconds, for all rows of one layer.

    Attributes
    ----------
    input_s, kv_s : float
        Per token: for its inputs, and for its keys and values, to cross the link.
    compute_s : float
        Per token: for keys and values to be made from the inputs.
    other_s : float
        Per layer: what the device does besides.
    """

    input_s: float
    kv_s: float
    compute_s: float
    other_s: float = 0.0

    def computed(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens in that time."""
        self.compute_s += NEW_SHARE * (seconds / tokens - self.compute_s)

    def did_besides(self, seconds: float) -> None:
        """What a layer took without waiting and computing again."""
        self.other_s += (NEW_SHARE if self.other_s else 1.0) * (seconds - self.other_s)


def layer_seconds(rates: Rates, tokens: int, split: int) -> float:
    """What a layer takes when the first ``split`` of its ``tokens`` are recomputed."""
    link = split * rates.input_s + (tokens - split) * rates.kv_s
    return max(link, split * rates.compute_s + rates.other_s)


def best_split(rates: Rates, tokens: int, most: int) -> int:
    """The split of least :func:`layer_seconds`, at most ``most``: where link and device take equally long."""
    if rates.input_s >= rates.kv_s:
        return 0
    crossing = (tokens * rates.kv_s - rates.other_s) / (rates.compute_s + rates.kv_s - rates.input_s)
    return max(0, min(most, int(crossing)))
