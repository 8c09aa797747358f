"""`Family`: where one family of models keeps what a layer's query, keys and values are made of."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scout_hf.errors import UnsupportedInputError, UnsupportedModelError

from .quiet import call

Part = Any
"""An ``nn.Module`` of a model: its class alone knows its attributes, so no type can say them."""


class Family:
    """Makes a decoder layer's query, or its keys and values, from a hidden state, with that layer's own modules.

    The defaults are those of Llama: `input_layernorm`, `self_attn.q_proj`, rotary embedding. A family overrides the
    steps in which it differs (`norm`, `project`, `project_keys_values`, `rotate`) and names its `model_types`.

    The softmax scale, the softcap and attention sinks are no part of a family: the model hands them to the
    attention function, and a second source for them would sooner or later disagree.
    """

    model_types: tuple[str, ...] = ()
    """Values of `config.get_text_config(decoder=True).model_type` that this family serves."""

    def decoder(self, model: Part) -> nn.Module:
        """The module that owns the decoder layers and the rotary embedding."""
        decoder = model.get_decoder()
        # Llama4's causal LM answers with itself.
        return decoder if hasattr(decoder, "layers") else getattr(decoder, "model", decoder)

    def layers(self, decoder: Part) -> Sequence[nn.Module]:
        """The decoder layers, first to last."""
        return decoder.layers

    def attention(self, layer: Part) -> nn.Module:
        """The self-attention module of one decoder layer."""
        return layer.self_attn

    def available(self, layer: Part) -> bool:
        """Whether `query` can run on this layer now.

        False for a layer without softmax attention (hybrid models) and while the weights are on the meta
        device: accelerate loads offloaded weights inside the layer's own forward, and loading them twice
        would cost more than a prediction saves.
        """
        try:
            attn = self.attention(layer)
        except AttributeError:
            return False
        # One weight tells for all: accelerate offloads whole layers, and this runs once per layer and token.
        return weight_device(attn, default=torch.device("cpu")).type != "meta"

    def query(
        self,
        decoder: Part,
        layer: Part,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The query that `layer` would hand to its attention function if `hidden` were its input.

        Args:
            decoder: what `decoder(model)` returns.
            layer: one of `layers(decoder)`.
            hidden: (batch, length, hidden_size), the model's dtype, on any device.
            position_ids: (1 or batch, length), integer. Needed where the angles must be computed again: no
                `position_embeddings` given, or other frequencies than those of the previous layer.
            position_embeddings: the (cos, sin) that the previous layer received, each
                (1 or batch, length, rotary_dim); None for models without a rotary embedding.

        Returns:
            (batch, query_heads, length, head_dim), the model's dtype, on the layer's device.
        """
        attn = self.attention(layer)
        hidden = hidden.to(weight_device(attn, default=hidden.device))
        q = self.project(attn, self.norm(layer, hidden))
        return self.rotate(decoder, layer, attn, q, position_ids, position_embeddings, hidden)

    def keys_values(
        self,
        decoder: Part,
        layer: Part,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The keys and values that `layer` would hand to `cache.update` if `hidden` were its input.

        Arguments are those of `query`; positions of several axes are (axes, 1 or batch, length). `hidden` may be any
        part of a sequence, with the positions of that part.

        Returns:
            (batch, kv_heads, length, head_dim) each, the model's dtype, on the layer's device.

        Raises:
            UnsupportedModelError: positions alone do not tell the angles (see `require_fixed_angles`).
        """
        attn = self.attention(layer)
        self.require_fixed_angles(decoder, attn, position_embeddings)
        hidden = hidden.to(weight_device(attn, default=hidden.device))
        keys, values = self.project_keys_values(attn, self.norm(layer, hidden))
        return self.rotate(decoder, layer, attn, keys, position_ids, position_embeddings, hidden), values

    def norm(self, layer: Part, hidden: Tensor) -> Tensor:
        """The layer's normalisation before attention: (batch, length, hidden_size) in and out."""
        return call(layer, "input_layernorm", hidden)

    def project(self, attn: Part, x: Tensor) -> Tensor:
        """Project and normalise: (batch, length, hidden_size) to (batch, query_heads, length, head_dim).

        Say `call(attn, "q_proj", x)`: neither `attn.q_proj(x)`, which would run hooks on what is only predicted, nor
        `F.linear` on its weight, which would miss LoRA and quantised linears.
        """
        return split_heads(call(attn, "q_proj", x), attn.head_dim)

    def project_keys_values(self, attn: Part, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project, and normalise keys: (batch, length, hidden_size) to twice (batch, kv_heads, length, head_dim)."""
        keys, values = (call(attn, name, x) for name in ("k_proj", "v_proj"))
        return split_heads(keys, attn.head_dim), split_heads(values, attn.head_dim)

    def rotate(
        self,
        decoder: Part,
        layer: Part,
        attn: Part,
        q: Tensor,
        position_ids: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
        hidden: Tensor,
    ) -> Tensor:
        """Apply the rotary embedding to q (batch, heads, length, head_dim), queries or keys; same shape out."""
        cos, sin = self.position_embeddings(decoder, attn, hidden, position_ids, position_embeddings)
        # The model's function rotates a query and a key together. A key without heads costs nothing, and
        # unlike the query itself it may be passed to hub kernels that rotate in place.
        return rotary_function(attn)(q, q[:, :0], cos, sin)[0]

    def require_fixed_angles(
        self, decoder: Part, attn: Part, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> None:
        """Refuse to make keys whose angles change while the sequence grows, unless the angles are given.

        Dynamic and LongRoPE embeddings take the length of a sequence from its last position. Stored keys keep the
        angles of the pass that made them; a part of the sequence would get those of another length, and asking for
        them would also leave the model's embedding in the state of that length.
        """
        kind = getattr(getattr(decoder, "rotary_emb", None), "rope_type", None)
        if isinstance(kind, dict):
            kind = kind[decoder.config.layer_types[attn.layer_idx]]
        elif position_embeddings is not None:
            return
        if kind is not None and ("dynamic" in kind or kind == "longrope"):
            raise UnsupportedModelError(
                f"keys of {type(decoder).__name__} cannot be made from hidden states and "
                f"positions: rope_type {kind!r} rotates by angles that depend on the length of the sequence too. Keep "
                "the keys themselves, or use a rope_type with fixed angles, for example 'default', 'yarn' or 'llama3'."
            )

    def position_embeddings(
        self,
        decoder: Part,
        attn: Part,
        hidden: Tensor,
        position_ids: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """The (cos, sin) that belong to this layer, on the device of `hidden`."""
        rotary = getattr(decoder, "rotary_emb", None)
        extra: tuple[str, ...] = ()
        if getattr(rotary, "layer_types", None):
            # Gemma3 and others rotate by layer type: the previous layer's angles hold only for its own type.
            types, index = decoder.config.layer_types, attn.layer_idx
            if index == 0 or types[index - 1] != types[index]:
                position_embeddings = None
            extra = (types[index],)
        if position_embeddings is not None:
            return _moved(position_embeddings, hidden.device)
        if rotary is None or position_ids is None:
            raise UnsupportedInputError(
                f"layer {attn.layer_idx} of {type(decoder).__name__} needs rotary angles of its own, but "
                f"position_ids is {type(position_ids).__name__} and the decoder's rotary_emb is "
                f"{type(rotary).__name__}. Pass the position_ids of the forward pass, (1 or batch, length)."
            )
        turned = call(decoder, "rotary_emb", hidden, position_ids.to(hidden.device), *extra)
        return _moved(turned, hidden.device)


def _moved(angles: Any, device: torch.device) -> Any:
    return tuple(part.to(device) for part in angles)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(batch, length, heads * head_dim) to (batch, heads, length, head_dim), without a copy."""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)


def weight_device(module: nn.Module, default: torch.device) -> torch.device:
    """The device of the module's first weight; `default` if it has none."""
    weight = _first(module, "_parameters")
    weight = _first(module, "_buffers") if weight is None else weight
    return default if weight is None else weight.device


def _first(module: nn.Module, kind: str) -> Tensor | None:
    """The first of `module.parameters()` or `buffers()`, whose generators cost more than a small projection."""
    for tensor in module.__dict__[kind].values():
        if tensor is not None:
            return tensor
    found = (_first(child, kind) for child in module._modules.values() if child is not None)
    return next((tensor for tensor in found if tensor is not None), None)


def rotary_function(attn: Part) -> Callable[..., Any]:
    """The `apply_rotary_pos_emb` of the file that defines the attention class.

    Base classes are searched too: FSDP and users subclass attention in modules of their own.
    """
    for cls in type(attn).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "apply_rotary_pos_emb", None)
        if function is not None:
            return function
    raise UnsupportedModelError(
        f"{type(attn).__module__} defines no apply_rotary_pos_emb next to {type(attn).__name__}. "
        "Write a Family with its own rotate() and pass it to scout_hf.patches.register_family."
    )
