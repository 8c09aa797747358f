"""``HybridLayer``: a layer with full attention and, beside it, a linear state, as in Falcon-H1."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from scout_hf.cache_layer import ScoutLayer
from scout_hf.compat.linear_layers import STATES, Linear, LinearAndFull
from scout_hf.compat.modes import keeps_tensors
from scout_hf.stores.state import State, state_in


class HybridLayer(Linear, ScoutLayer):
    """Keys and values are kept by a method, the state as transformers keeps it.

    A state is written in place and holds all tokens before: it can be forked, reordered and saved, but no tokens can be
    taken from it, and a failed pass cannot be rolled back.
    """

    is_compileable = False

    def __init__(self, states: int, *args: Any):
        ScoutLayer.__init__(self, *args)
        Linear.__init__(self, number_of_states=states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # Keys and values come by position, states by name.
        ScoutLayer.lazy_initialization(self, *args) if args else Linear.lazy_initialization(self, **kwargs)

    def offload(self) -> None:
        """Nothing to do: the state is small."""

    prefetch = offload

    def reset(self) -> None:
        """Remove all tokens."""
        ScoutLayer.reset(self)
        Linear.reset(self)

    def crop(self, length: int | torch.Tensor) -> None:
        """As of both; :meth:`ScoutCache.crop` refuses before anything is changed where a state keeps no past."""
        ScoutLayer.crop(self, length)
        Linear.crop(self, int(length))

    def reorder_cache(self, beam_idx: Any) -> None:
        """Replace row ``i`` by row ``beam_idx[i]``."""
        ScoutLayer.reorder_cache(self, beam_idx)
        Linear.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self.method:
            rows = torch.arange(self.method.batch, dtype=torch.int64, device="cpu")
            self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor | Sequence[int]) -> None:
        """Keep the rows ``indices``: row numbers, or a bool per row."""
        rows = torch.as_tensor(indices, device="cpu")
        self.reorder_cache(rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows)

    @keeps_tensors
    def __deepcopy__(self, memo: dict[int, Any]) -> HybridLayer:
        twin = ScoutLayer.__deepcopy__(self, memo)
        twin.__dict__.update({name: copy.deepcopy(self.__dict__[name], memo) for name in STATES})
        return twin

    def to_dynamic(self) -> Any:
        """A stock layer with copies of the same tokens and states."""
        twin, plain = LinearAndFull(self.number_of_states), ScoutLayer.to_dynamic(self)
        if plain.is_initialized:
            twin.lazy_initialization(plain.keys, plain.values)
            twin.keys, twin.values = plain.keys, plain.values
        twin.__dict__.update({name: copy.deepcopy(self.__dict__[name]) for name in STATES})
        return twin

    def state_dict(self) -> State | None:
        state = ScoutLayer.state_dict(self)
        return state and state | {"linear": {name: self.__dict__[name] for name in STATES}}

    def load_states(self, state: State, device: torch.device) -> None:
        held = state_in(state, "linear")
        self.__dict__.update({name: _on(state_in(held, name), device) for name in STATES})


def _on(values: State, device: torch.device) -> State:
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in values.items()}
