"""Which rows of a cache are kept, reordered or repeated: checked before the first layer changes."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch

from scout_hf.errors import RowsError

SELECT, REORDER, REPEAT = "batch_select_indices", "reorder_cache", "batch_repeat_interleave"


def rows_held(layers: Iterable[Any]) -> int | None:
    """Rows of the first layer that holds keys and values; None if there is none."""
    for layer in layers:
        if (method := getattr(layer, "method", None)) is not None:
            return int(method.batch)
        if not hasattr(layer, "method") and (keys := getattr(layer, "keys", None)) is not None and keys.dim() > 1:
            return len(keys)
    return None


def rows_asked(operation: str, given: Any, held: int | None) -> torch.Tensor | int:
    """What a call for other rows asks for.

    Parameters
    ----------
    operation : str
        Name of the function of ``Cache`` that was called.
    given : Tensor or sequence of int or bool, or int
        Row numbers, which may count from the end where stock allows that; to select also a bool per row; to repeat, how
        many times.
    held : int or None
        Rows in the cache; None if that is not known.

    Returns
    -------
    Tensor (rows,) of int64 on the CPU, or int

    Raises
    ------
    RowsError
        For what is none of this, and rows that the cache does not hold.

    Examples
    --------
    >>> from scout_hf.rows import SELECT, rows_asked
    >>> rows_asked(SELECT, [False, True, True], 3).tolist()
    [1, 2]
    """
    if operation == REPEAT:
        return _times(given)
    try:
        rows = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refusal(operation, f"a {type(given).__name__}", held) from error
    if rows.dim() != 1:
        raise _refusal(operation, f"numbers of shape {tuple(rows.shape)}", held)
    if rows.dtype == torch.bool and operation == SELECT:
        if len(rows) != (len(rows) if held is None else held):
            raise _refusal(operation, f"{len(rows)} numbers of bool", held)
        return rows.nonzero().squeeze(1)
    # Of uint8 torch makes a mask where it indexes, and numbers where it selects.
    if rows.numel() and rows.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8):
        raise _refusal(operation, f"numbers of {rows.dtype}", held)
    rows = rows.long()
    if held is not None:
        least = -held if operation == SELECT else 0
        if (wrong := rows[(rows < least) | (rows >= held)]).numel():
            raise _refusal(operation, f"row {wrong[0].item()}", held)
        rows = rows % max(held, 1)
    return rows


def _times(given: Any) -> int:
    try:
        times = operator.index(given)
    except TypeError:
        times = -1
    if times < 0:
        raise RowsError(
            f"{REPEAT}() got {given!r}; give one whole number, how many times each row is to be repeated. Nothing was "
            f"changed; to repeat rows unequally, use {SELECT}()"
        )
    return times


def _refusal(operation: str, got: str, held: int | None) -> RowsError:
    which = "" if held is None else f", each from {-held if operation == SELECT else 0} to {held - 1}"
    also = " or a bool for each row of the cache" if operation == SELECT else ""
    has = "" if held is None else f", and the cache holds {held} rows"
    return RowsError(
        f"{operation}() got {got}{has}. Give whole numbers of rows in one dimension{which}{also}. Nothing was changed"
    )
