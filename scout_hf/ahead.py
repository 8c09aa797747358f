"""Queries, keys and values that a layer would compute from a hidden state, by its own modules, outside its forward.

Only speed depends on it: a layer whose modules were replaced or wrapped, or cannot be called now, is not predicted and
attends with its real query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from scout_hf.cache_layer import ScoutLayer
from scout_hf.errors import UnsupportedModelError
from scout_hf.layouts import PLAIN
from scout_hf.patches.quiet import call, has_hooks, is_replaced
from scout_hf.ranks import LOCAL, rules_of_attention


class Parts:
    """Computes queries, keys and values of single layers of a patched model.

    Parameters
    ----------
    family : Family
    decoder : Module
        What ``family.decoder(model)`` returns.
    model : PreTrainedModel
    """

    def __init__(self, family: Any, decoder: torch.nn.Module, model: Any):
        self._family, self._decoder = family, decoder
        self._gathered = _gathered(model, family)

    def query(
        self, step: Any, index: int, layer: Any, hidden: torch.Tensor, given: dict[str, Any], held: ScoutLayer
    ) -> torch.Tensor | None:
        """The query of ``layer``, which has this index, if ``hidden`` were its input; None if it cannot be predicted.

        ``given`` are the keyword arguments that the previous layer received, ``held`` the layer of the cache.
        """
        places = given.get("position_ids"), given.get("position_embeddings")
        try:
            if not self._family.available(layer):
                return None
            if self._gathered is not None:
                raise UnsupportedModelError(self._gathered)
            query = self._family.query(self._decoder, layer, hidden, *places)
            if held.layout is not PLAIN:
                query = held.layout.query(self._family.attention(layer), query, call)
            made, known = (query.shape[1], query.shape[3]), held.method and held.method.query_shape
            if known is not None and made != known:
                raise ValueError(f"its modules make a query of {made} heads and channels, but it attends with {known}")
        except MemoryError:
            raise
        except Exception as error:
            step.counters.note("prediction", f"off, the real query is used: {error}", index)
            return None
        return query

    def keys_values(
        self, layers: Sequence[Any], index: int, hidden: torch.Tensor, position_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Keys and values of layer ``index`` for these inputs; None while its weights are not on a device.

        They are as ``layers[index]`` of a cache stores them.

        Raises ScoutError if its modules are not those that its family expects.
        """
        layer = self._family.layers(self._decoder)[index]
        if not self._family.available(layer):
            return None
        if self._gathered is not None:
            raise UnsupportedModelError(self._gathered)
        if position_ids is not None and position_ids.dim() == 3:
            position_ids = position_ids.movedim(-1, 0)
        try:
            made: Any = self._family.keys_values(self._decoder, layer, hidden, position_ids)
            return layers[index].layout.stored(*made)
        except (AttributeError, TypeError, ValueError) as error:
            raise UnsupportedModelError(f"layer {index} was changed: {error}") from error

    def untouched(self, index: int) -> bool:
        """Whether only the layer's own code determines its keys: no hooks of others, no replaced functions."""
        layer = self._family.layers(self._decoder)[index]
        before = [getattr(hook, "func", hook) for hook in layer._forward_pre_hooks.values()]
        ours = all(getattr(hook, "__module__", "").startswith("scout_hf.") for hook in before)
        if not ours or is_replaced(layer) or torch_module._has_any_global_hook():
            return False
        parts = [part for part in layer.children() if not part._modules]
        try:
            parts += self._family.attention(layer).modules()
        except AttributeError:
            return False
        return not any(has_hooks(part) or is_replaced(part) for part in parts)


def _gathered(model: Any, family: Any) -> str | None:
    """Why ranks of tensor parallel cannot predict each for itself; None if they can, or in one process."""
    for part, rule in rules_of_attention(model, family).items():
        if rule not in LOCAL:
            return f"{part} is {rule!r} in the model's tp_plan, so that ranks would have to wait for each other"
    return None
