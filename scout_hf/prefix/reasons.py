"""What a prefix store cannot serve, and why: models and calls whose keys depend on more than the tokens before them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from scout_hf.cache import ScoutCache
from scout_hf.compat.indexed_layers import choosing_layers
from scout_hf.ranks import Ranks
from scout_hf.token_log import has_plain_positions, is_plain

OF_GENERATE = frozenset({"is_first_iteration", "next_sequence_length"})
HARMLESS = ("transformers.", "accelerate.")
"""Libraries whose own hooks change no activations."""


def of_model(model: Any) -> str | None:
    """Why no text of a model can be kept; None if they can."""
    kind = _changing_rope(model.config)
    if kind is not None:
        return f"with {kind} rotary angles, keys depend on the length of the whole text"
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "use_bidirectional_attention", None):
        return "tokens attend to those that follow, so keys depend on the rest of the text"
    if {"hybrid", "hybrid_sliding"} & set(getattr(text, "layer_types", None) or ()):
        return "a layer holds a linear state beside its keys and values, which only a session keeps"
    if text.model_type == "jamba":
        return "its state-space layers begin anew in every pass of several tokens, so that it cannot go on from a text"
    if choosing_layers(text):
        return "layers choose what they attend to with an indexer: its keys lie in no page, and no step is sparser"
    return None


def of_ranks(model: Any) -> str | None:
    """Why texts of a model that is spread over ranks cannot be found; None for a model in one process."""
    size = Ranks(model).size
    if size == 1:
        return None
    return f"it runs on {size} ranks, and if they found beginnings of different lengths, they would wait for ever"


def of_call(
    model: Any, ids: Any, kwargs: dict[str, Any], cache: ScoutCache, is_ours: Callable[[Any], bool]
) -> str | None:
    """Why a call is not served; None if it is.

    Parameters
    ----------
    model : PreTrainedModel
    ids : Tensor (batch, tokens)
    kwargs : dict
        Of ``prepare_inputs_for_generation``.
    cache : ScoutCache
        That the call fills.
    is_ours : callable
        Whether a hook of a module is one of the patch.
    """
    given = {name: value for name, value in kwargs.items() if name not in OF_GENERATE}
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if not cache.scout_layers:
        return "a model of which no layer is kept by scout_hf"
    if given.get("output_hidden_states"):
        return "output_hidden_states=True, which wants those of the whole prompt"
    if ids is None or ids.dim() != 2 or not is_plain(given | {"input_ids": ids}):
        return "inputs that are more than token ids"
    if isinstance(mask, torch.Tensor) and mask.dim() != 2:
        return "a mask of its own"
    if positions is not None:
        plain = positions.dim() == 2 and positions.shape[1] == ids.shape[1]
        if not plain or not has_plain_positions(positions, mask, 0):
            return "positions of its own"
    if any(getattr(layer, "record_past", False) for layer in cache.layers):
        return "drafts, as this model has layers with states of their own"
    return of_state(model, is_ours)


def of_state(model: Any, is_ours: Callable[[Any], bool]) -> str | None:
    """Why the state that a model is in cannot be told by its weights; None if it can."""
    for module in model.modules():
        if module.training and (module is model or (isinstance(module, torch.nn.Dropout) and module.p > 0)):
            return "a model in training mode"
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if not is_ours(hook) and not _module_of(hook).startswith(HARMLESS):
                return f"a hook on a {type(module).__name__}, which may change what it computes"
    return None


def version_of(model: torch.nn.Module) -> int:
    """A number that grows when a weight is written to."""
    try:
        return sum(weight._version for weight in model.parameters())
    except RuntimeError:  # tensors of inference mode count nothing
        return 0


def _module_of(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", ""))


def _changing_rope(config: Any) -> str | None:
    """The kind of rotary angles that change with the length of a text; None if they do not."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    several = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    kinds = {str(one.get("rope_type", one.get("type"))) for one in several}
    return next((kind for kind in ("dynamic", "longrope") if kind in kinds), None)
