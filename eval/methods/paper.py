"""What the comparison says of two results of ScoutAttention (arXiv 2603.27138): the order of methods, and the parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from scout_hf.eval.bench.formats import short, three
from scout_hf.eval.methods import view
from scout_hf.eval.methods.ways import ABLATIONS, KEPT, PREDICTED

ORDER = (PREDICTED, "hgca", KEPT)
"""By decode throughput at every context, the highest first (figure 8)."""

ABLATION = (*reversed(ABLATIONS), PREDICTED)
GAINS = (1.39, 1.20)
"""What one layer ahead brings, and what recall brings on top (figure 12)."""


def sentences(record: dict[str, Any]) -> Iterator[str]:
    """One on each, for the longest context that all of its ways were timed at."""
    if found := _longest(record, ORDER):
        place, speed = found
        names = sorted(ORDER, key=lambda name: -speed[name])
        told = "; ".join(f"{name} {three(speed[name])}" for name in names)
        order = "the order" if tuple(names) == ORDER else f"not the order ({'; '.join(ORDER)})"
        yield (
            f"At {short(place.context)} tokens and batch {place.batch} tokens/s are {told}: {order} of the paper's "
            "figure 8."
        )
        if (stock := view.best_stock(view.at(record, place))) and stock < 1e3 * place.batch / speed[names[-1]]:
            yield (
                f"Stock, {three(1e3 * place.batch / stock)}, holds all KV on the device at the same batch; in the "
                "paper memory keeps its batch small, and it is last."
            )
    if found := _longest(record, ABLATION):
        place, speed = found
        ahead, recall = (speed[after] / speed[before] for before, after in zip(ABLATION, ABLATION[1:]))
        yield (
            f"Of scout's parts, at {short(place.context)} tokens, one layer ahead makes it {view.faster(ahead)}, "
            f"recall another {view.faster(recall)}; on the paper's machine {GAINS[0]:.2f} and {GAINS[1]:.2f} times "
            "(figure 12)."
        )


def _longest(record: dict[str, Any], names: tuple[str, ...]) -> tuple[view.Place, dict[str, float]] | None:
    for place in sorted(view.places(record), key=lambda place: (-place.context, -place.batch)):
        speed = {one["way"]: one["tokens_per_s"] for one in view.measured(view.at(record, place))}
        if place.shape == view.main_shape(record) and all(name in speed for name in names):
            return place, speed
    return None
