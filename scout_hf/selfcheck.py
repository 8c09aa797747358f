"""A trial run of models of unknown families, on a few tokens, before patch() returns."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from scout_hf.compat.cache_names import CACHE
from scout_hf.errors import ScoutError, UnsupportedModelError
from scout_hf.patches import ProbeFamily
from scout_hf.patches.quiet import compiled_from

TOKENS = 6
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
HISTORY = 2**16
"""Buffers of more elements are taken for packed weights, which no pass writes to, and are not copied."""

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def check_unknown_family(model: Any, family: Any, handle_of: Callable[[Any], Any], foreign: bool) -> None:
    """Compare patched with stock logits on a short prompt and one decode step.

    Known families are not tried, unless code outside transformers attends (``foreign``). The trial runs on a twin of
    the model without hooks, patched by ``handle_of(twin)``, so that hooks of users do not see it.

    Raises
    ------
    UnsupportedModelError
        If the model cannot run with a ScoutCache, or its logits differ.
    """
    if not isinstance(family, ProbeFamily) and not foreign:
        return
    name, model = type(model).__name__, twin(model).eval()
    handle = handle_of(model)
    try:
        handle._install()
        first, second, stock = _trial(model, name, handle)
    finally:
        handle._uninstall()
    expected = torch.stack([stock[:, -2], stock[:, -1]]).float()
    error = (torch.stack([first, second]).float() - expected).abs().max().item()
    allowed = TOLERANCE.get(stock.dtype, 1e-1) * max(1.0, expected.abs().max().item())
    if not error <= allowed:
        raise UnsupportedModelError(
            f"{name} is of an unknown family and its patched logits differ by {error:.2g} (allowed {allowed:.2g}): its "
            "attention does something that scout_hf does not support; use it unpatched"
        )


def _trial(model: Any, name: str, handle: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.arange(1, TOKENS + 1, dtype=torch.int64, device=model.device).unsqueeze(0)
    ids = ids % model.config.get_text_config().vocab_size
    try:
        with torch.no_grad():
            cache = handle.new_cache(budget=None, layer_ahead=False)
            first = model(input_ids=ids[:, :-1], **{CACHE: cache}, use_cache=True).logits[:, -1]
            second = model(input_ids=ids[:, -1:], **{CACHE: cache}, use_cache=True).logits[:, -1]
            return first, second, model(input_ids=ids, use_cache=False).logits
    except ScoutError as error:
        raise UnsupportedModelError(f"{name} is of an unknown family and is not supported: {error}") from error
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} is of an unknown family and its trial run failed ({type(error).__name__}: {error}); add "
            "it with scout_hf.patches.register_family, or use it unpatched"
        ) from error


def twin(module: nn.Module) -> nn.Module:
    """A model with the same weights in new modules, without hooks, and with copies of buffers that a pass may write."""
    while (inner := compiled_from(module)) is not None:
        module = inner
    view = object.__new__(type(module))
    own = view.__dict__
    own.update(module.__dict__)
    own.update((hooks, OrderedDict()) for hooks in _HOOKS)
    own["_compiled_call_impl"] = None
    if "rope_deltas" in own:
        own["rope_deltas"] = None  # offset of the last prompt's images, which the trial does not have
    own["_modules"] = {name: child if child is None else twin(child) for name, child in module._modules.items()}
    own["_buffers"] = {name: _own(buffer) for name, buffer in module._buffers.items()}
    for name in ("forward", "_old_forward"):
        if name in own:
            own[name] = _bound_to(view, module, own[name])
    return view


def _own(buffer: torch.Tensor | None) -> torch.Tensor | None:
    return buffer if buffer is None or buffer.numel() > HISTORY else buffer.clone()


def _bound_to(view: nn.Module, module: nn.Module, function: Any) -> Any:
    """The same function for the twin; accelerate and others store functions on modules."""
    if isinstance(function, MethodType) and function.__self__ is module:
        return MethodType(function.__func__, view)
    if isinstance(function, functools.partial) and function.args[:1] == (module,):
        return functools.partial(function.func, view, *function.args[1:], **function.keywords)
    return function
