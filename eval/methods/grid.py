"""The cells of a comparison, in the order in which they are measured: the first say what later ones need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from scout_hf.eval.methods import ways

SPEED, EQUAL, SCORE = "speed", "equal", "score"
SCORE_ONLY = (ways.KVPRESS, "scout, one tier")
SPEED_ONLY = (ways.FOLDED, *ways.SAME_ANSWERS)
EXACT_WAYS = ("kvpr", "dense", "stock")
MOST_ROWS = 16
GIB = 2**30

Cell = dict[str, Any]


def cells(
    chosen: Sequence[str],
    shape: str,
    contexts: Sequence[int],
    batches: Sequence[int],
    mha_contexts: Sequence[int],
    equal_context: int | None,
    memory_gib: Sequence[float],
    model: str,
    tasks: Sequence[str],
    score_context: int,
    budget_shares: Sequence[float],
) -> Iterator[Cell]:
    """All of them; arguments as of :func:`scout_hf.eval.methods.run.run`."""
    fast = [name for name in chosen if name not in SCORE_ONLY]
    yield from _speed(shape, contexts, batches, fast)
    yield from _speed("mha", mha_contexts, (1,), [name for name in fast if name in EXACT_WAYS])
    if equal_context:
        yield from ({"part": EQUAL, "way": way, "shape": shape, "context": equal_context} for way in fast)
    for context in contexts:
        for gib in memory_gib:
            for way in fast:
                yield {"part": EQUAL, "way": way, "shape": shape, "context": context, "gib": gib}
    for task in tasks:
        for way in (name for name in chosen if name not in SPEED_ONLY):
            shares = [int(share * score_context) for share in budget_shares]
            for budget in shares if ways.find(way).takes_budget else [score_context]:
                where = {"part": SCORE, "way": way, "model": model, "task": task}
                yield where | {"context": score_context, "budget": budget}


def rows_that_fit(record: dict[str, Any], cell: Cell) -> int | None:
    """Rows of an ``equal`` cell: as many as fit into ``gib``, or into the device memory of one stock row.

    By what a row of a ``speed`` cell held, beside the weights, 0 where one is too much; None where there is none.
    """
    same = [one for one in record["cells"] if one["part"] == SPEED and "step_ms" in one]
    same = [one for one in same if (one["shape"], one["context"]) == (cell["shape"], cell["context"])]
    per_row = {one["way"]: one["device_bytes"] / one["batch"] for one in same}
    if cell["way"] not in per_row or ("gib" not in cell and "stock" not in per_row):
        return None
    if "gib" in cell:
        return min(MOST_ROWS, int(cell["gib"] * GIB / max(1.0, per_row[cell["way"]])))
    # A cache holds a few tokens more where more steps were timed.
    return min(MOST_ROWS, int(1.01 * per_row["stock"] / max(1.0, per_row[cell["way"]])))


def _speed(shape: str, contexts: Sequence[int], batches: Sequence[int], chosen: Sequence[str]) -> Iterator[Cell]:
    for context in contexts:
        for batch in batches:
            for way in chosen:
                yield {"part": SPEED, "way": way, "shape": shape, "context": context, "batch": batch}
