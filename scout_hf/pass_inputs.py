"""The arguments of a forward pass by name, and checks that a ScoutCache supports them."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from scout_hf.compat.cache_names import given_cache
from scout_hf.errors import UnsupportedInputError


def named_arguments(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the module's ``forward`` by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args)), **kwargs}


def refuse_unservable(module: torch.nn.Module, given: dict[str, Any], inputs: torch.Tensor) -> None:
    """Raise UnsupportedInputError for no tokens, and masks, outputs or gradients that a ScoutCache does not support."""
    if not inputs.shape[1] and (cache := given_cache(given)) is not None:
        raise UnsupportedInputError(
            f"there are no new tokens: the cache holds {cache.get_seq_length()}, and generate() leaves out as many of "
            "its input_ids; give all tokens from the beginning: those in the cache (cache.token_ids), then new ones"
        )
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        kind = f"{mask.dim()}-D" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UnsupportedInputError(
            f"attention_mask is {kind}; a ScoutCache takes a 2-D padding mask (batch, tokens), not a custom pattern; "
            "use a DynamicCache for this call"
        )
    if given.get("output_attentions"):
        raise UnsupportedInputError(
            "output_attentions=True is not supported with a ScoutCache: attention weights are never computed in whole; "
            "use a DynamicCache for this call"
        )
    if given.get("return_shared_kv_states"):
        raise UnsupportedInputError(
            "an assistant model that reads the keys and values of this model cannot read them from a ScoutCache; "
            "generate without it (patch(model, draft=True) makes drafts of its own), or pass a DynamicCache"
        )
    if torch.is_grad_enabled() and (inputs.requires_grad or _learns(module)):
        raise UnsupportedInputError(
            "a ScoutCache holds no gradients; wrap the call in torch.no_grad(), or train without a cache"
        )


def _learns(module: torch.nn.Module) -> bool:
    return module.training or any(weight.requires_grad for weight in module.parameters())
