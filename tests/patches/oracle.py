"""The true query, keys and values of every layer, recorded inside a real forward pass of the model."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.patches.tiny import VOCAB

RECORDING = "recording_oracle"


@dataclass
class Seen:
    """What one layer received, and what it handed to its attention function or its cache for these tokens."""

    hidden: Tensor
    position_ids: Tensor | None
    position_embeddings: object
    query: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass
class Step:
    """One forward pass: what every layer saw, and the logits."""

    layers: list[Seen] = field(default_factory=list)
    logits: Tensor | None = None


def _record(module, query, key, value, attention_mask, **kwargs):
    new = (part[:, :, -query.shape[2] :] for part in (query, key, value))
    module.__dict__["oracle"] = [part.detach().clone() for part in new]
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(RECORDING, _record)
AttentionMaskInterface.register(RECORDING, eager_mask)


@contextmanager
def _recording(model, layers, seen, positions):
    before = model.config._attn_implementation
    model.set_attn_implementation(RECORDING)
    try:
        with _noting_inputs(layers, seen, positions):
            yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _noting_inputs(layers, seen, positions):
    def note(layer, args, kwargs):
        # Granite 4 hands its layers angles alone.
        own = kwargs.get("position_ids")
        places = positions if own is None else own
        seen.append(Seen(args[0].clone(), places, kwargs.get("position_embeddings")))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def decode_step(model, family, length: int, prefix: int = 20, seed: int = 0) -> Step:
    """Prefill two rows of `prefix` tokens, the second left-padded by 3, then step by `length` tokens.

    Returns what happened in the step. `layers[i].query` is None for a layer without softmax attention.
    """
    layers = family.layers(family.decoder(model))
    ids, mask, positions = _two_rows(prefix + length, seed)
    step = Step()
    # The model makes the cache: some hybrid models need a class of their own.
    cache = model(
        input_ids=ids[:, :prefix],
        attention_mask=mask[:, :prefix],
        position_ids=positions[:, :prefix],
        use_cache=True,
    ).past_key_values
    with _recording(model, layers, step.layers, positions[:, prefix:]):
        out = model(
            input_ids=ids[:, prefix:],
            attention_mask=mask,
            position_ids=positions[:, prefix:],
            past_key_values=cache,
            use_cache=True,
        )
    step.logits = out.logits
    for layer, seen in zip(layers, step.layers, strict=True):
        attention = [module for module in layer.modules() if "oracle" in module.__dict__]
        if attention:
            seen.query, seen.keys, seen.values = attention[0].__dict__.pop("oracle")
    return step


@torch.no_grad()
def prompt_pass(model, family, length: int = 20, seed: int = 0) -> Step:
    """One pass of the stock model over two rows of `length` tokens, the second left-padded by 3.

    `layers[i].keys` and `values` are what layer i handed to `cache.update`; None for one without softmax attention.
    """
    layers = family.layers(family.decoder(model))
    ids, mask, positions = _two_rows(length, seed)
    step = Step()
    # The model makes the cache: some hybrid models need a class of their own.
    cache_class = type(model(input_ids=ids[:, :1], use_cache=True).past_key_values)
    update = cache_class.update

    def noted(cache, key_states, value_states, layer_idx, *args, **kwargs):
        step.layers[layer_idx].keys, step.layers[layer_idx].values = key_states.clone(), value_states.clone()
        return update(cache, key_states, value_states, layer_idx, *args, **kwargs)

    with _noting_inputs(layers, step.layers, positions), patch.object(cache_class, "update", noted):
        step.logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True).logits
    return step


def _two_rows(length, seed):
    ids = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def predict(family, model, step: Step, index: int, what: str = "query", **changes):
    """`family.query`, or another method, for layer `index`, called as from layer `index - 1` on its true input."""
    decoder = family.decoder(model)
    seen, previous = step.layers[index], step.layers[max(index - 1, 0)]
    inputs = {
        "hidden": seen.hidden,
        "position_ids": seen.position_ids,
        "position_embeddings": previous.position_embeddings,
    }
    with torch.no_grad():
        return getattr(family, what)(decoder, family.layers(decoder)[index], **(inputs | changes))


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, in float32."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"shapes or dtypes differ: {tuple(a.shape)} {a.dtype}, {tuple(b.shape)} {b.dtype}")
    return (a.float() - b.float()).abs().max().item()


def relative(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference as a part of the largest of `b`, in float64."""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"shapes or dtypes differ: {tuple(a.shape)} {a.dtype}, {tuple(b.shape)} {b.dtype}")
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
