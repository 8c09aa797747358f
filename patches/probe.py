"""`ProbeFamily`: query, keys and values of any model, by running its layer up to the attention call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers import AttentionInterface, PreTrainedConfig

from scout_hf.compat.cache_names import CACHE
from scout_hf.errors import UnsupportedModelError

from .base import Family, weight_device
from .quiet import check, compiled_from, is_bare, stand_in

CAPTURE = "scout_probe"


class Captured(Exception):
    """Carries query, keys and values out of the layer, so that nothing after the attention call runs."""

    def __init__(self, query: Tensor, keys: Tensor, values: Tensor):
        super().__init__("attention call captured")
        self.query, self.keys, self.values = query, keys, values


def _capture(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
    raise Captured(query, key, value)


# Registered for the whole process, but used only by the private configs of `private_view`.
AttentionInterface.register(CAPTURE, _capture)


class ProbeFamily(Family):
    """Fallback for families without a file of their own: correct by construction, half as fast.

    Runs a view of the layer whose attention function captures its arguments. Query, keys and values are all computed,
    even if only some are needed. The model is never changed, so other threads may use it. No hooks run, on the layer or
    on modules inside it.

    Examples
    --------
    >>> family, decoder = ProbeFamily(), ProbeFamily().decoder(model)
    >>> query = family.query(decoder, family.layers(decoder)[1], hidden, position_ids)
    """

    def layers(self, decoder: Any) -> Sequence[nn.Module]:
        """The `layers` of the decoder, or, under whatever name, its list of as many modules that hold attention."""
        if hasattr(decoder, "layers"):
            return decoder.layers
        depth = getattr(decoder.config, "num_hidden_layers", None)
        for module in decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                attention = _attention_in(module[-1])
                if attention is not None and getattr(attention, "is_causal", True):
                    return cast("Sequence[nn.Module]", module)
        raise AttributeError(f"{type(decoder).__name__} holds no list of {depth} layers with attention")

    def attention(self, layer: nn.Module) -> nn.Module:
        attention = _attention_in(layer)
        if attention is not None:
            return attention
        raise AttributeError(f"{type(layer).__name__} holds no attention module (one with layer_idx and config)")

    def query(
        self,
        decoder: nn.Module,
        layer: nn.Module,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return self._attention_call(decoder, layer, hidden, position_ids, position_embeddings).query

    def keys_values(
        self,
        decoder: nn.Module,
        layer: nn.Module,
        hidden: Tensor,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        self.require_fixed_angles(decoder, self.attention(layer), position_embeddings)
        captured = self._attention_call(decoder, layer, hidden, position_ids, position_embeddings)
        return captured.keys, captured.values

    def _attention_call(
        self,
        decoder: nn.Module,
        layer: nn.Module,
        hidden: Tensor,
        position_ids: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | None,
    ) -> Captured:
        attn = self.attention(layer)
        hidden = hidden.to(weight_device(attn, default=hidden.device))
        if position_ids is not None:
            position_ids = position_ids.to(hidden.device)
        inputs = {
            "attention_mask": None,
            "position_ids": position_ids,
            CACHE: None,
            "use_cache": False,
            "position_embeddings": self._angles(decoder, attn, hidden, position_ids, position_embeddings),
        }
        try:
            private_view(layer, decoder)(hidden, **inputs)
        except Captured as captured:
            return captured
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UnsupportedModelError(
                f"{type(layer).__name__} cannot be run on its own: {error}. {_WHAT_TO_DO}"
            ) from error
        raise UnsupportedModelError(
            f"{type(layer).__name__} never called the attention interface of transformers. {_WHAT_TO_DO}"
        )

    def _angles(
        self,
        decoder: nn.Module,
        attn: nn.Module,
        hidden: Tensor,
        position_ids: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor] | Tensor | None,
    ) -> Any:
        """As `position_embeddings`, also for decoders without a rotary embedding or with another kind."""
        if isinstance(position_embeddings, Tensor):
            return position_embeddings.to(hidden.device)
        if position_embeddings is None and getattr(decoder, self.rotary_name(decoder), None) is None:
            return None
        return self.position_embeddings(decoder, attn, hidden, position_ids, position_embeddings)


_WHAT_TO_DO = "Turn prediction off, or write a Family for this model and pass it to scout_hf.patches.register_family."


def _attention_in(layer: nn.Module) -> nn.Module | None:
    """The first module in a layer that has a config and the layer's number of its own."""
    for module in layer.modules():
        if module is not layer and hasattr(module, "layer_idx") and own_config(module) is not None:
            return module
    return None


def own_config(module: nn.Module) -> PreTrainedConfig | None:
    """The config in the module's own `__dict__`, or None."""
    config = module.__dict__.get("config")
    return config if isinstance(config, PreTrainedConfig) else None


def private_view(layer: nn.Module, decoder: nn.Module) -> nn.Module:
    """A copy of `layer` with the same weights and no hooks, whose attention calls raise `Captured`.

    Changing the model's own config would be simpler, but would affect other threads that use the model. So modules that
    read a config or have hooks, and their parents, are replaced; all others, and all parameters and buffers, are the
    model's own. Nothing is kept between calls, so adapters may be added or removed at any time.

    Modules that `check` refuses raise only when they are called: most of a layer comes after the attention call.
    """
    view = _view(layer, decoder, {}, not torch_module._has_any_global_hook())
    return view if view is not layer else stand_in(layer, dict(layer._modules), None)


def _view(module: nn.Module, decoder: nn.Module, configs: dict[int, PreTrainedConfig], quiet: bool) -> nn.Module:
    while (inner := compiled_from(module)) is not None:
        module = inner
    children = {
        name: child if child is None else _view(child, decoder, configs, quiet)
        for name, child in module._modules.items()
    }
    try:
        check(module, decoder)
        run = None
    except UnsupportedModelError as error:
        run = _refusal(error)
    config = own_config(module)
    same = all(child is module._modules[name] for name, child in children.items())
    if config is None and same and run is None and quiet and is_bare(module):
        return module
    view = stand_in(module, children, run)
    if config is not None:
        if id(config) not in configs:
            configs[id(config)] = copy.copy(config)
            # Not `_attn_implementation`: its setter writes to the sub-configs, which are the model's own.
            configs[id(config)]._attn_implementation_internal = CAPTURE
        view.__dict__["config"] = configs[id(config)]
    return view


def _refusal(error: UnsupportedModelError) -> Callable[..., NoReturn]:
    def run(module: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        raise error

    return run
