"""The attention and mask functions that are registered with transformers. Without a ScoutCache they call stock ones.

The registered name contains the model's previous implementation (``scout_over_sdpa``), so that forward passes without
a ScoutCache find their own attention without any state, also in models that share a config object.
"""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from typing import Any, NoReturn

import torch
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, causal_mask_function

from scout_hf.attention_name import AttentionName
from scout_hf.cache_layer import ScoutLayer
from scout_hf.compat.modes import keeps_tensors
from scout_hf.errors import ScoutError, UnsupportedInputError, UnsupportedModelError
from scout_hf.fusion import Partial, fuse
from scout_hf.kernels.attend import alike_where_empty
from scout_hf.layouts import PLAIN, Layout, layout_of
from scout_hf.masks import allowed_by, for_prompt, is_special, refuse_unless_padding
from scout_hf.methods.base import Method, Scoring
from scout_hf.methods.several_tokens import pages_of_all
from scout_hf.own_choice import choice_of
from scout_hf.plain_attention import attention_function, prompt_function, prompt_mask_function
from scout_hf.prefill import prefill
from scout_hf.step import Role, Step, active_step

# Arguments that change which keys are attended, or how; plain causal attention layers pass none of them.
UNSERVED = frozenset({"sliding_window", "position_bias", "indices", "block_indices", "sinks"})


def register_over(name: AttentionName) -> None:
    """Register scout_hf's attention and mask functions under ``name.key``."""
    if not is_registered(name):
        AttentionInterface.register(name.key, functools.partial(scout_attention, str(name)))
        AttentionMaskInterface.register(name.key, functools.partial(scout_mask, str(name)))


def is_registered(name: AttentionName) -> bool:
    """Whether scout_hf's attention is registered under ``name``; loading hub kernels may have replaced it."""
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
    step, index = active_step(), getattr(module, "layer_idx", None)
    layer = None if step is None or index is None else step.cache.layer_of(index)
    if step is None or layer is None or index is None:
        return attention_function(previous, module)(module, query, key, value, attention_mask, **kwargs)
    method, layout, incoming = layer.method_of(index), layer.layout, layer.incoming.pop(index, None)
    if method is None or incoming is None or not (incoming.given is key or layout.expands):
        _refuse_keys(layer, module, key)
    if method.follows_choice:
        step.choice = choice_of(step, module, method, query, attention_mask, kwargs)
    elif not UNSERVED.isdisjoint(kwargs) and (unknown := [name for name in UNSERVED if kwargs.get(name) is not None]):
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {', '.join(sorted(unknown))} on layer {index}, whose "
            "cache layer is a plain full-attention one; scout_hf does not support that: unpatch the model"
        )
    newest = query.shape[2]
    # Layers that store no KV may leave out tokens of a prompt whose logits nobody asked for.
    if newest != step.queries and (newest > step.queries or method.stored_by is None):
        raise UnsupportedInputError(
            f"{type(module).__name__} got {newest} tokens in a pass that began with {step.queries}: the model "
            "inserts tokens, which a ScoutCache does not support; use a DynamicCache for this call"
        )
    scale = kwargs.get("scaling")
    scoring = query.shape[-1] ** -0.5 if scale is None else scale, kwargs.get("softcap")
    if method.scoring != scoring:
        method.scoring = Scoring(*scoring)
    method.query_shape = query.shape[1], incoming.keys.shape[3]
    special = attention_mask is not None and not method.follows_choice and is_special(step, attention_mask)
    out = None
    first = step.queries > 1 and method.length == step.queries
    if first and not method.follows_choice:
        mask = None if step.mask is None else step.padding(query.device)
        alone = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
        stock, attention = prompt_function(previous, module, special=alone)
        # Indexers look at padding too, which must have attended to what stock's mask says.
        if special or (step.cache.asks_for_choice and attention_mask is not None):
            out = attention(module, query, key, value, for_prompt(attention_mask, stock, query), **kwargs)[0]
        elif alone or layout.expands or not _is_faster_by_pages(method, step, query, stock, kwargs):
            out = prefill(attention, stock, module, query, key, value, mask, **kwargs)
    elif special and step.queries == 1:
        refuse_unless_padding(step, attention_mask)
    elif step.queries > 1:
        # The same in further chunks of a prompt, where eager attention gives padding the mean of all values.
        beside = step.cache.asks_for_choice and not method.follows_choice
        padding = beside and previous == "eager" and attention_mask is not None
        step.allowed = allowed_by(step, attention_mask, newest) if special or padding else None
        if padding and step.allowed is not None:
            query, step.allowed = alike_where_empty(query, step.allowed)
    if kwargs.get("dropout") and method.length > step.queries:
        _tell_of_dropout(step, kwargs["dropout"])
    # Switching autocast off costs more than a small attention: do it only where it is on.
    mixed = torch.is_autocast_enabled(query.device.type)
    with torch.autocast(query.device.type, enabled=False) if mixed else contextlib.nullcontext():
        own = query if query.dtype == method.dtype else query.to(method.dtype)
        real = own if layout is PLAIN else layout.query(module, own)
        if step.queries == 1 and not step.as_several:
            begun, step.fuses_more = time.perf_counter(), kwargs.get("s_aux") is not None
            result = method.attend(step, real)
            if not isinstance(result, Partial) or not result.out.shape[:3] == result.lse.shape == real.shape[:3]:
                _refuse_result(method, result, real)
            if step.auto is not None and not method.follows_choice:
                step.auto.attended(time.perf_counter() - begun)
            out = _finish(layout, module, result, own, query.dtype, kwargs.get("s_aux"))
        elif out is None:
            given, held = layout, incoming[1:]
            if first and method.follows_choice:
                # Keys and values that a model expands from latents are narrower than these.
                given = layout_of(key, value, None)
                held = given.stored(key, value)
            keys, values = (part[:, :, -newest:].to(method.dtype) for part in held)
            result = method.attend_many(step, given.query(module, own), keys, values)
            out = _finish(given, module, result, own, query.dtype, kwargs.get("s_aux"))
            if step.as_several:
                step.counters.attended(method.layer_idx, step.context(), step.context())
        several = step.queries > 1 and step.role is not Role.CHECK
        if several:
            method.observe(step, real)
        method.settle(step)
        if several:
            method.prefilled(step, real[:, :, -1:])
    return out, None


@torch.compiler.disable
def scout_mask(previous: str, *args: Any, **kwargs: Any) -> Any:
    """Mask function as transformers calls it: scout layers need no causal mask, all others get the stock one."""
    step = active_step()
    # Attention that was registered without a mask function gets no mask.
    stock = ALL_MASK_ATTENTION_FUNCTIONS.get(previous, _no_mask)
    if step is None or kwargs.get("local_size") is not None:
        return stock(*args, **kwargs)
    plain = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    if plain and not step.cache.has_stock_full_layers:
        return None
    if not plain:
        return prompt_mask_function(previous)(*args, **kwargs)
    mask = stock(*args, **kwargs)
    step.plain_masks.append(mask)
    return mask


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def _tell_of_dropout(step: Step, share: float) -> None:
    """Warn once per handle, whose counters hold the notes."""
    if ("dropout", None) not in step.counters.notes:
        message = (
            f"the model is in training mode with an attention dropout of {share}; passes over tokens that a ScoutCache "
            "holds leave it out. Call model.eval(), or use a DynamicCache for stock attention with dropout"
        )
        step.counters.note("dropout", message)
        warnings.warn(f"scout_hf: {message}", RuntimeWarning, stacklevel=2)


def _is_faster_by_pages(method: Method, step: Step, query: torch.Tensor, stock: str, given: dict[str, Any]) -> bool:
    """Whether a prompt is attended over the pages in place of stock's kernel, which is as exact.

    In float32 it is not: there a prompt gives the bits of stock.
    """
    half = query.dtype == method.dtype and query.dtype in (torch.bfloat16, torch.float16)
    plain = stock == "sdpa" and not given.get("dropout")
    return half and plain and pages_of_all(method, step, query) is not None


def _refuse_result(method: Method, result: Any, query: torch.Tensor) -> NoReturn:
    """Raise ScoutError for what a method's ``attend`` returned, which is no Partial of the right shape."""
    shapes = "" if not isinstance(result, Partial) else f" of {tuple(result.out.shape)}, {tuple(result.lse.shape)}"
    raise ScoutError(
        f"attend() of method {method.name!r} returned a {type(result).__name__}{shapes}; it must return a Partial: "
        f"out {tuple(query.shape)} and lse {tuple(query.shape[:3])}, as scout_hf.kernels.attend.attend gives it"
    )


def _finish(
    layout: Layout,
    module: torch.nn.Module,
    result: Partial,
    query: torch.Tensor,
    dtype: torch.dtype,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    if sinks is not None:
        lse = sinks.to(result.lse.dtype).view(1, -1, 1).expand_as(result.lse)
        result = fuse([result, Partial(torch.zeros_like(result.out), lse)])
    out = result.out if layout is PLAIN else layout.output(module, result.out, query)
    out = out.to(dtype)
    # With one query per row the two orders are the same in memory.
    return out.reshape(out.shape[0], 1, *out.shape[1::2]) if out.shape[2] == 1 else out.transpose(1, 2).contiguous()


def _refuse_keys(layer: ScoutLayer, module: torch.nn.Module, key: torch.Tensor) -> NoReturn:
    """Raise UnsupportedModelError for keys that are not those that ``layer`` stored in this pass."""
    name, index = type(module).__name__, module.layer_idx
    if index != layer.layer_idx and layer.method is not None and key.device != layer.device:
        raise UnsupportedModelError(
            f"layer {index} of {name} is on {key.device} and attends over the KV of layer {layer.layer_idx}, which is "
            f"on {layer.device}; scout_hf needs both on one device: load the model with a device_map that has them "
            "together, or unpatch it"
        )
    raise UnsupportedModelError(
        f"{name} changes keys between cache.update() and attention, which scout_hf does not support; unpatch the "
        "model, or report the family"
    )
