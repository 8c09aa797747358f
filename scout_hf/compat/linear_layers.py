"""Cache layers with states of a fixed size, which releases before 5.5 do not have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import cache_utils


class _Absent:
    """Stands for a class that the installed release does not have: nothing is an instance of it."""


Linear: Any = getattr(cache_utils, "LinearAttentionLayer", _Absent)
"""A layer of linear attention, a state space or a convolution."""
LinearAndFull: Any = getattr(cache_utils, "LinearAttentionAndFullAttentionLayer", _Absent)
"""The same and full attention, side by side in one layer."""

STATES = (
    "conv_states",
    "recurrent_states",
    "is_conv_states_initialized",
    "is_recurrent_states_initialized",
    "has_previous_state",
    "conv_kernel_size",
)
"""Attributes with an entry per state."""


def keeps_no_past(layer: Any) -> bool:
    """Whether a layer holds a state from which no tokens can be taken."""
    recording = getattr(layer, "record_past", False) and getattr(layer, "is_croppable", False)
    return isinstance(layer, Linear) and not recording


def drop_states(layers: Iterable[Any]) -> None:
    """Leave layers without states, so that new ones may have other rows; ``reset`` of stock keeps tensors of zeros."""
    for layer in layers:
        if isinstance(layer, Linear):
            states = getattr(layer, "number_of_states", None)
            fresh = vars(Linear() if states is None else Linear(number_of_states=states))
            layer.__dict__.update({name: fresh[name] for name in STATES if name in fresh})


def rows_from(rows: torch.Tensor | int, held: int) -> torch.Tensor:
    """The rows to reorder to: those numbers, or so many times each of ``held`` rows."""
    if not isinstance(rows, int):
        return rows
    return torch.arange(held, dtype=torch.int64, device="cpu").repeat_interleave(rows)
