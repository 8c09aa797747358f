"""Whether a family computes the query that a layer would have, from the layer's true input in a decode step."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import scout_hf
from scout_hf.errors import UnsupportedInputError, UnsupportedModelError

TOLERANCE = 1e-5
"""Of the largest element of a query."""
EXACT, OFF = "exact", "off"
RECORDING, SEEN = "scout_recording", "scout_seen"


def prediction(model: Any, family: Any, inputs: dict[str, torch.Tensor]) -> str:
    """``exact``; ``off``, where a family says that it predicts nothing; else what is wrong."""
    try:
        return _compared(model, family, _decode_step(model, family, inputs))
    except (UnsupportedInputError, UnsupportedModelError):
        # As in a pass, where such a layer attends with its real query.
        return OFF
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _compared(model: Any, family: Any, seen: list[dict[str, Any]]) -> str:
    decoder = family.decoder(model)
    layers = family.layers(decoder)
    asked = 0
    for index in range(1, len(layers)):
        if "query" not in seen[index] or not family.available(layers[index]):
            continue
        given = seen[index - 1]
        query = family.query(
            decoder, layers[index], seen[index]["hidden"], given["position_ids"], given["position_embeddings"]
        )
        asked += 1
        true = seen[index]["query"]
        error = (query - true).abs().max().item() / true.abs().max().item()
        if not error <= TOLERANCE:
            return f"wrong: the query of layer {index} differs by {error:.1e}"
    return EXACT if asked else OFF


def _decode_step(model: Any, family: Any, inputs: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """What each layer of the unpatched model gets in a decode step, and the query that it attends with."""
    layers, seen = family.layers(family.decoder(model)), []

    def note(layer: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        hidden = args[0] if args else given["hidden_states"]
        places = {name: given.get(name) for name in ("position_ids", "position_embeddings")}
        seen.append({"hidden": hidden.clone()} | places)

    ids = inputs["input_ids"]
    before = model.config._attn_implementation
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True)[scout_hf.CACHE]
        AttentionInterface.register(RECORDING, _record)
        AttentionMaskInterface.register(RECORDING, eager_mask)
        model.set_attn_implementation(RECORDING)
        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        try:
            model(input_ids=ids[:, -1:], **{scout_hf.CACHE: cache}, use_cache=True)
        finally:
            model.set_attn_implementation(before)
            [hook.remove() for hook in hooks]
    for layer, one in zip(layers, seen, strict=True):
        queries = [module.__dict__.pop(SEEN) for module in layer.modules() if SEEN in module.__dict__]
        one |= {"query": queries[0]} if queries else {}
    return seen


def _record(module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    module.__dict__[SEEN] = query.clone()
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, *args, **kwargs)
