"""Cache layers with states of a fixed size, which releases before 5.5 do not have."""

from __future__ import annotations

from typing import Any

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
