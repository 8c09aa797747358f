"""`Family`: how the layers of a family of models compute query, keys and values."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scout_hf.errors import UnsupportedInputError, UnsupportedModelError

from .own_forward import OwnForward
from .quiet import call

Part = Any
"""An ``nn.Module`` of a model, untyped because its attributes depend on its class."""


class Family:
    """Computes a decoder layer's query, keys and values from a hidden state, with the layer's own modules.

    The defaults are Llama's: `input_layernorm`, `self_attn.q_proj`, rotary embedding. A family overrides the steps in
    which it differs (`norm`, `project`, `project_keys_values`, `rotate`) and names its `model_types`. Softmax scale,
    softcap and attention sinks are not part of a family: the model passes them to the attention function.

    Examples
    --------
    >>> class MyFamily(Family):
    ...     model_types = ("my_model",)
    ...
    ...     def norm(self, layer, hidden):
    ...         return call(layer, "attention_norm", hidden)
    >>> register_family(MyFamily())
    """

    model_types: tuple[str, ...] = ()
    """Values of `config.get_text_config(decoder=True).model_type` that this family serves."""

    def decoder(self, model: Part) -> nn.Module:
        """The module that owns the decoder layers and the rotary embedding."""
        decoder = model.get_decoder()
        if not decoder._modules:
            # ModernBERT's head is called `decoder`.
            decoder = model.base_model
        # get_decoder() of Llama4's causal LM returns the model itself.
        return decoder if hasattr(decoder, "layers") else getattr(decoder, "model", decoder)

    def check(self, decoder: Part) -> None:
        """Raise UnsupportedModelError for models of these types that are not supported."""

    def layers(self, decoder: Part) -> Sequence[nn.Module]:
        """The decoder layers, first to last."""
        return decoder.layers

    def attention(self, layer: Part) -> nn.Module:
        """The self-attention module of one decoder layer."""
        return layer.self_attn

    def available(self, layer: Part) -> bool:
        """Whether `query` can run on this layer now.

        False for a layer without softmax attention (hybrid models), and while its weights are on the meta device:
        accelerate loads offloaded weights inside the layer's forward, and loading them twice costs more than a
        prediction saves.
        """
        try:
            attn = self.attention(layer)
        except AttributeError:
            return False
        # One weight is enough: accelerate offloads whole layers, and this runs once per layer and token.
        return weight_device(attn, default=torch.device("cpu")).type != "meta"

    def query(
        self,
        decoder: Part,
        layer: Part,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The query that `layer` would pass to its attention function if `hidden` were its input.

        Parameters
        ----------
        decoder : Module
            The result of `decoder(model)`.
        layer : Module
            One of `layers(decoder)`.
        hidden : Tensor (batch, length, hidden_size)
            In the model's dtype, on any device.
        position_ids : Tensor (1 or batch, length) of int, or None
            Needed to compute rotary angles: without `position_embeddings`, or if the previous layer has other
            frequencies.
        position_embeddings : tuple of Tensor (1 or batch, length, rotary_dim), or None
            The (cos, sin) that the previous layer received; None for models without a rotary embedding.

        Returns
        -------
        Tensor (batch, query_heads, length, head_dim)
            In the model's dtype, on the layer's device.

        Raises
        ------
        UnsupportedInputError
            If rotary angles are needed and `position_ids` is missing.
        UnsupportedModelError
            If a module cannot be called without its hooks (see `call`).

        Examples
        --------
        >>> family, decoder = family_of(model), family_of(model).decoder(model)
        >>> layer = family.layers(decoder)[1]
        >>> query = family.query(decoder, layer, hidden, position_ids)
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
        """The keys and values that `layer` would pass to `cache.update` if `hidden` were its input.

        Parameters
        ----------
        decoder, layer, hidden, position_ids, position_embeddings
            As in `query`. `hidden` may be any part of a sequence, with the positions of that part. Positions with
            several axes are (axes, 1 or batch, length).

        Returns
        -------
        tuple of Tensor (batch, kv_heads, length, head_dim)
            Keys and values, in the model's dtype, on the layer's device.

        Raises
        ------
        UnsupportedModelError
            If the rotary angles depend on more than the positions (see `require_fixed_angles`).

        Examples
        --------
        >>> keys, values = family.keys_values(decoder, layer, hidden, position_ids)
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

        Use `call(attn, "q_proj", x)`, not `attn.q_proj(x)`, which would run users' hooks on a prediction, and not
        `F.linear` with its weight, which would ignore LoRA and quantised linears.
        """
        return split_heads(call(attn, "q_proj", x), attn.head_dim)

    def project_keys_values(self, attn: Part, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project, and normalise keys: (batch, length, hidden_size) to two of (batch, kv_heads, length, head_dim)."""
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
        # The model's function rotates a query and a key together. A key without heads costs nothing; passing the
        # query twice would be wrong for hub kernels that rotate in place.
        return rotary_function(attn)(q, q[:, :0], cos, sin)[0]

    def require_fixed_angles(
        self, decoder: Part, attn: Part, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> None:
        """Raise UnsupportedModelError if angles depend on the sequence length and are not given.

        Dynamic and LongRoPE embeddings take the sequence length from the last position. Stored keys keep the angles of
        the pass that made them. A part of the sequence would get the angles of another length, and would change the
        state of the model's embedding.
        """
        kind = getattr(getattr(decoder, self.rotary_name(decoder), None), "rope_type", None)
        if isinstance(kind, dict):
            kind = kind[decoder.config.layer_types[attn.layer_idx]]
        elif position_embeddings is not None:
            return
        if kind is not None and ("dynamic" in kind or kind == "longrope"):
            raise UnsupportedModelError(
                f"keys of {type(decoder).__name__} cannot be made from hidden states and "
                f"positions: the angles of rope_type {kind!r} depend on the length of the sequence too. Keep the keys "
                "themselves, or use a rope_type with fixed angles, for example 'default', 'yarn' or 'llama3'."
            )

    def rotary_name(self, decoder: Part) -> str:
        """The name of the decoder's rotary embedding; LFM2 with experts has another one."""
        return "pos_emb" if hasattr(decoder, "pos_emb") else "rotary_emb"

    def position_embeddings(
        self,
        decoder: Part,
        attn: Part,
        hidden: Tensor,
        position_ids: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """The (cos, sin) of this layer, on the device of `hidden`."""
        name = self.rotary_name(decoder)
        rotary = getattr(decoder, name, None)
        extra: tuple[str, ...] = ()
        if getattr(rotary, "layer_types", None):
            # Gemma3 and others have angles per layer type: those of the previous layer are valid for its type only.
            types, index = decoder.config.layer_types, attn.layer_idx
            if index == 0 or types[index - 1] != types[index]:
                position_embeddings = None
            extra = (types[index],)
        if position_embeddings is not None:
            return _moved(position_embeddings, hidden.device)
        if rotary is None or position_ids is None:
            raise UnsupportedInputError(
                f"layer {attn.layer_idx} of {type(decoder).__name__} needs rotary angles of its own, but "
                f"position_ids is {type(position_ids).__name__} and the decoder's {name} is "
                f"{type(rotary).__name__}. Pass the position_ids of the forward pass, (1 or batch, length)."
            )
        if hasattr(rotary, "mrope_section") and position_ids.dim() == 2:
            # Before 5.24 Qwen3.5's takes positions on three axes alone.
            position_ids = position_ids.expand(3, -1, -1)
        turned = call(decoder, name, hidden, position_ids.to(hidden.device), *extra)
        return _moved(turned, hidden.device)


def _moved(angles: Any, device: torch.device) -> Any:
    if isinstance(angles, Tensor):
        return angles.to(device)
    cos, sin = angles
    return cos.to(device), sin.to(device)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(batch, length, heads * head_dim) to (batch, heads, length, head_dim), without a copy."""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)


def weight_device(module: nn.Module, default: torch.device) -> torch.device:
    """The device of the module's first weight; `default` if it has none."""
    weight = _first(module, "_parameters")
    weight = _first(module, "_buffers") if weight is None else weight
    return default if weight is None else weight.device


def _first(module: nn.Module, kind: str) -> Tensor | None:
    """The first of `module.parameters()` or `buffers()`, without their generators, which are slow."""
    waiting = [module]
    while waiting:
        here = waiting.pop()
        for tensor in here.__dict__[kind].values():
            if tensor is not None:
                return tensor
        waiting += [child for child in reversed(here._modules.values()) if child is not None]
    return None


def rotary_function(attn: Part, name: str = "apply_rotary_pos_emb") -> Callable[..., Any]:
    """A function of the file that defines the attention class, by default its rotary embedding, or a patch's own.

    Base classes are searched too: FSDP and users subclass attention in modules of their own.
    """
    forward = attn.__dict__.get("forward")
    if isinstance(forward, OwnForward) and forward.rotary is not None and forward.rotary_name == name:
        return forward.rotary
    for cls in type(attn).__mro__:
        function = getattr(sys.modules.get(cls.__module__), name, None)
        if function is not None:
            return function
    raise UnsupportedModelError(
        f"{type(attn).__module__} defines no {name} next to {type(attn).__name__}. "
        "Write a Family with its own rotate() and pass it to scout_hf.patches.register_family."
    )
