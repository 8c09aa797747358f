"""How long the rest of a text takes: attention makes every chunk slower than the one before."""

from __future__ import annotations

from dataclasses import dataclass, field

WARM_AFTER = 3


@dataclass
class Pace:
    """Seconds per token as ``a + b * position``, fitted to the chunks so far.

    Once there are three, the first one is left out: it warms up memory and kernels.

    Examples
    --------
    >>> from scout_hf.eval.ask.pace import Pace
    >>> pace = Pace()
    >>> pace.add(0, 100, 1.0)
    >>> pace.add(100, 200, 2.0)
    >>> pace.seconds(200, 400)
    7.0
    """

    chunks: list[tuple[int, int, float]] = field(default_factory=list)

    def add(self, first: int, last: int, seconds: float) -> None:
        """Note that tokens ``first`` to ``last`` took so long."""
        if last > first:
            self.chunks.append((first, last, seconds))

    def seconds(self, first: int, last: int) -> float | None:
        """How long tokens ``first`` to ``last`` will take; None before the first chunk."""
        if not self.chunks:
            return None
        a, b = self._fitted()
        return a * (last - first) + b * (last**2 - first**2) / 2

    def _fitted(self) -> tuple[float, float]:
        """Least squares, weighted by tokens; neither the constant nor the slope is below 0."""
        known = self.chunks[1:] if len(self.chunks) >= WARM_AFTER else self.chunks
        weights = [last - first for first, last, _ in known]
        places = [(first + last) / 2 for first, last, _ in known]
        rates = [seconds / weight for (_, _, seconds), weight in zip(known, weights)]
        total = sum(weights)
        x, y = (sum(w * v for w, v in zip(weights, values)) / total for values in (places, rates))
        spread = sum(w * (place - x) ** 2 for w, place in zip(weights, places))
        slope = sum(w * (place - x) * (rate - y) for w, place, rate in zip(weights, places, rates))
        b = slope / spread if spread else 0.0
        if b <= 0:
            return y, 0.0
        if y - b * x < 0:
            both = [sum(w * p * v for w, p, v in zip(weights, places, values)) for values in (rates, places)]
            return 0.0, both[0] / both[1]
        return y - b * x, b


def in_words(seconds: float) -> str:
    """A time as people say it.

    Examples
    --------
    >>> from scout_hf.eval.ask.pace import in_words
    >>> in_words(7.2), in_words(190), in_words(5400)
    ('7 s', '3 min 10 s', '1 h 30 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
