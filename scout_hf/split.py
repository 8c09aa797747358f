"""How many tokens to recompute: the cost model of KVPR (arXiv 2411.17089, section 3.2), one layer ahead.

In the paper a layer's transfers begin with the layer: inputs first, then KV beside the recomputation,
``l * input_s + max(l * compute_s, (n - l) * kv_s)``. Here they begin one layer earlier, so that link and device are
both always busy, and a layer takes as long as the slower of the two.
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
        Per token: transfer of its inputs; transfer of its keys and values.
    compute_s : float
        Per token: computing keys and values from the inputs.
    other_s : float
        Per layer: all other work of the device.
    """

    input_s: float
    kv_s: float
    compute_s: float
    other_s: float = 0.0

    def computed(self, tokens: int, seconds: float) -> None:
        """Update ``compute_s`` after a step that recomputed ``tokens`` tokens in ``seconds``."""
        self.compute_s += NEW_SHARE * (seconds / tokens - self.compute_s)

    def did_besides(self, seconds: float) -> None:
        """Update ``other_s`` with the time of a layer without waiting and recomputation."""
        self.other_s += (NEW_SHARE if self.other_s else 1.0) * (seconds - self.other_s)


def layer_seconds(rates: Rates, tokens: int, split: int) -> float:
    """Seconds of a layer if the first ``split`` of its ``tokens`` are recomputed."""
    link = split * rates.input_s + (tokens - split) * rates.kv_s
    return max(link, split * rates.compute_s + rates.other_s)


def best_split(rates: Rates, tokens: int, most: int) -> int:
    """The split, at most ``most``, with the least :func:`layer_seconds`: link and device take equally long."""
    if rates.input_s >= rates.kv_s:
        return 0
    crossing = (tokens * rates.kv_s - rates.other_s) / (rates.compute_s + rates.kv_s - rates.input_s)
    return max(0, min(most, int(crossing)))
