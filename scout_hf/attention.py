"""The functions registered with transformers: attention over a ScoutCache, and its mask. Everything else falls through.

The implementation that a model had before is part of the registered name (``scout_over_sdpa``), so that models sharing
a config object and forward passes without a ScoutCache find their own attention without any state.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, causal_mask_function

from scout_hf.attention_name import AttentionName
from scout_hf.cache import ScoutLayer
from scout_hf.compat.modes import keeps_tensors
from scout_hf.errors import ScoutError, UnsupportedInputError, UnsupportedModelError
from scout_hf.fusion import Partial, fuse
from scout_hf.masks import allowed_by, for_prompt, is_special, refuse_unless_padding
from scout_hf.methods.base import Method, Scoring
from scout_hf.plain_attention import attention_function, prompt_function, prompt_mask_function
from scout_hf.prefill import prefill
from scout_hf.step import Step, active_step

# Arguments that change which keys are seen, or how; none comes from a plain causal attention layer.
UNSERVED = frozenset({"sliding_window", "position_bias", "indices", "block_indices", "sinks"})


def register_over(name: AttentionName) -> None:
    """Let transformers find scout_hf's functions under ``name``, over the implementation that it reads as."""
    if not is_registered(name):
        AttentionInterface.register(name.key, functools.partial(scout_attention, str(name)))
        AttentionMaskInterface.register(name.key, functools.partial(scout_mask, str(name)))


def is_registered(name: AttentionName) -> bool:
    """Whether transformers finds scout_hf's attention under ``name``; who loads kernels may register others there."""
    return getattr(AttentionInterface._global_mapping.get(name.key), "func", None) is scout_attention


@keeps_tensors
def scout_attention(
    previous: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """Attention function as transformers calls it; query is (batch, query_heads, queries, head_dim)."""
    step = active_step()
    if step is None or (layer := _layer_of(step, module)) is None:
        return attention_function(previous, module)(module, query, key, value, attention_mask, **kwargs)
    method = layer.method
    if method is None or layer.incoming is not key:
        raise UnsupportedModelError(
            f"{type(module).__name__} changes keys between cache.update() and attention, which scout_hf cannot follow; "
            "unpatch the model, or report the family"
        )
    layer.incoming = None
    if not UNSERVED.isdisjoint(kwargs) and (unknown := [name for name in UNSERVED if kwargs.get(name) is not None]):
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {', '.join(sorted(unknown))} on layer {module.layer_idx}, whose "
            "cache layer is a plain full-attention one; scout_hf cannot follow that: unpatch the model"
        )
    if query.shape[2] != step.queries:
        raise UnsupportedInputError(
            f"{type(module).__name__} got {query.shape[2]} tokens in a pass that began with {step.queries}: the model "
            "puts tokens of its own between, which a ScoutCache cannot follow; use a DynamicCache for this call"
        )
    scale = kwargs.get("scaling")
    method.scoring = Scoring(query.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("softcap"))
    method.query_shape = query.shape[1], query.shape[3]
    special = is_special(step, attention_mask)
    if step.queries > 1 and method.length == step.queries:
        mask = None if step.mask is None else step.padding(query.device)
        alone = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
        stock, attention = prompt_function(previous, module, special=alone)
        if special:
            out = attention(module, query, key, value, for_prompt(attention_mask, stock, query), **kwargs)[0]
        else:
            out = prefill(attention, stock, module, query, key, value, mask, **kwargs)
    elif special and step.queries == 1:
        refuse_unless_padding(step, attention_mask)
    elif step.queries > 1:
        step.allowed = allowed_by(step, attention_mask) if special else None
    if kwargs.get("dropout") and method.length > step.queries:
        _tell_of_dropout(step, kwargs["dropout"])
    # Entering autocast's switch costs more than a small attention: only where it is on.
    mixed = torch.is_autocast_enabled(query.device.type)
    with torch.autocast(query.device.type, enabled=False) if mixed else contextlib.nullcontext():
        real = query if query.dtype == method.dtype else query.to(method.dtype)
        if step.queries == 1:
            out = _finish(_checked(method, method.attend(step, real), real), query, kwargs.get("s_aux"))
        elif method.length > step.queries:
            keys, values = key.to(method.dtype), value.to(method.dtype)
            out = _finish(method.attend_many(step, real, keys, values), query, kwargs.get("s_aux"))
        if step.queries > 1:
            method.observe(step, real)
        method.settle(step)
        if step.queries > 1:
            method.prefilled(step, real[:, :, -1:])
    return out, None


@torch.compiler.disable
def scout_mask(previous: str, *args: Any, **kwargs: Any) -> Any:
    """Mask function as transformers calls it: scout layers take a causal one from the step, all others as it is."""
    step = active_step()
    # Who registers attention without masks gets none.
    stock = ALL_MASK_ATTENTION_FUNCTIONS.get(previous, _no_mask)
    if step is None or kwargs.get("local_size") is not None:
        return stock(*args, **kwargs)
    plain = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    if plain and not step.cache.has_stock_full_layers:
        return kwargs.get("attention_mask")
    if not plain:
        return prompt_mask_function(previous)(*args, **kwargs)
    mask = stock(*args, **kwargs)
    step.plain_masks.append(mask)
    return mask


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _tell_of_dropout(step: Step, share: float) -> None:
    """Once per handle, whose tallies the notes are."""
    if ("dropout", None) not in step.counters.notes:
        told = (
            f"the model is in training mode with an attention dropout of {share}, which a pass over what a ScoutCache "
            "holds leaves out; call model.eval(), or use a DynamicCache for stock attention with dropout"
        )
        step.counters.note("dropout", told)
        warnings.warn(f"scout_hf: {told}", RuntimeWarning, stacklevel=2)


def _checked(method: Method, result: Partial, query: torch.Tensor) -> Partial:
    """What a method's ``attend`` gave; its author is told if it is nothing to go on with."""
    if not isinstance(result, Partial) or not result.out.shape[:3] == result.lse.shape == query.shape[:3]:
        shapes = "" if not isinstance(result, Partial) else f" of {tuple(result.out.shape)}, {tuple(result.lse.shape)}"
        raise ScoutError(
            f"attend() of method {method.name!r} returned a {type(result).__name__}{shapes}; it must return a Partial: "
            f"out {tuple(query.shape)} and lse {tuple(query.shape[:3])}, as scout_hf.kernels.attend.attend gives it"
        )
    return result


def _finish(result: Partial, query: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    if sinks is not None:
        lse = sinks.to(result.lse.dtype).view(1, -1, 1).expand_as(result.lse)
        result = fuse([result, Partial(torch.zeros_like(result.out), lse)])
    out = result.out.to(query.dtype)
    # With one query per row the two orders are the same in memory.
    return out.reshape(out.shape[0], 1, *out.shape[1::2]) if out.shape[2] == 1 else out.transpose(1, 2).contiguous()


def _layer_of(step: Step, module: torch.nn.Module) -> ScoutLayer | None:
    index = getattr(module, "layer_idx", None)
    if index is None or index >= len(step.cache.layers):
        return None
    layer = step.cache.layers[index]
    return layer if isinstance(layer, ScoutLayer) else None
