"""Calls a module outside the model's forward pass, without hooks and without changing the model.

Users' hooks expect what the model computes, not predictions. They cannot be removed for the call, since other threads
may use the model. So the `forward` of the module's class is called, without hooks, without functions that accelerate or
others put in place of `forward`, and without torch.compile. A module with children, such as a LoRA layer, is replaced
by a copy with the same weights if one of its children has any of these.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from scout_hf.errors import UnsupportedModelError
from scout_hf.ranks import here

from .own_forward import OwnForward

KNOWN = frozenset(
    {
        "aqlm",
        "auto_gptq",
        "awq",
        "bitsandbytes",
        "compressed_tensors",
        "eetq",
        "gptqmodel",
        "hqq",
        "liger_kernel",
        "optimum",
        "peft",
        "quanto",
        "torch",
        "torchao",
        "transformers",
        "vptq",
    }
)
"""Packages whose layers always give the same output for the same input."""

OBSERVERS = "torch.ao.quantization"
"""Except these, which record the range of their inputs."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def call(owner: nn.Module, name: str, *args: Any) -> Tensor:
    """Compute `getattr(owner, name)(*args)` without running hooks or changing the module.

    Parameters
    ----------
    owner : Module
        A layer or its attention module.
    name : str
        Name of a module in it, such as `"q_proj"`.
    *args
        Arguments of the module.

    Returns
    -------
    Tensor
        The module's output.

    Raises
    ------
    UnsupportedModelError
        If the call might change the module, or its weights are not loaded.

    Examples
    --------
    >>> normed = call(layer, "input_layernorm", hidden)
    """
    module = getattr(owner, name)
    if module._modules:
        module = quiet(module, owner)
        return type(module).forward(module, *args)
    check(module, owner)
    if is_spread(module):
        return type(module).forward(stand_in(module, {}, None), *args)
    forward = module.__dict__.get("forward")
    return forward(*args) if isinstance(forward, OwnForward) else type(module).forward(module, *args)


def quiet(module: nn.Module, owner: nn.Module) -> nn.Module:
    """A module with children, or a copy of it if needed, whose children are called without hooks."""
    while (inner := compiled_from(module)) is not None:
        module = inner
    bare = not torch_module._has_any_global_hook()
    for part in module.modules():
        check(part, owner)
        bare = bare and (part is module or is_bare(part))
    return module if bare else _silenced(module)


def check(module: nn.Module, owner: nn.Module) -> None:
    """Raise UnsupportedModelError for a module that a call might change, or whose weights are offloaded."""
    if not is_known(type(module), owner):
        reason = "of an unknown package: an additional call might change it"
    elif module.training and (getattr(module, "p", False) or _notes_what_passes(module)):
        reason = "in training mode: a call would draw random numbers or update buffers"
    else:
        for weight in module._parameters.values():
            if weight is not None and weight.is_meta:
                reason = "offloaded: its weights are loaded in the layer's forward only"
                break
        else:
            return
    kind = type(module)
    raise UnsupportedModelError(f"{kind.__module__}.{kind.__qualname__} in {type(owner).__name__} is {reason}")


def _notes_what_passes(module: nn.Module) -> bool:
    # Buffers of transformers' own modules (angles, tables) do not change in training.
    return bool(module._buffers) and not type(module).forward.__module__.startswith("transformers.")


def is_known(kind: type[nn.Module], owner: nn.Module) -> bool:
    """Whether modules of this class may be called at any time: of a known package or the model's own files."""
    home = kind.forward.__module__
    if home.partition(".")[0] in KNOWN:
        return not home.startswith(OBSERVERS)
    return package(home) == package(type(owner).__module__)


def package(module_name: str) -> str:
    """The package of a Python module; the module itself if it has none."""
    return module_name.rpartition(".")[0] or module_name


def is_spread(module: nn.Module) -> bool:
    """Whether this rank has a part of the module's own weights only, in tensors that stand for the whole."""
    for weight in module._parameters.values():
        if hasattr(weight, "to_local"):
            return True
    return False


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module computes what the `forward` of its class does and nothing else."""
    inside = module.__dict__
    replaced = "forward" in inside and not isinstance(inside["forward"], OwnForward)
    return not (replaced or inside.get("_compiled_call_impl") or has_hooks(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether the module has hooks."""
    for hooks in _HOOKS:
        if module.__dict__[hooks]:
            return True
    return False


def is_replaced(module: nn.Module) -> bool:
    """Whether `forward` was replaced on the instance, but for `OwnForward` and accelerate, which only moves tensors."""
    if "forward" not in module.__dict__ or isinstance(module.__dict__["forward"], OwnForward):
        return False
    return not type(module.__dict__.get("_hf_hook")).__module__.startswith("accelerate.")


def compiled_from(module: nn.Module) -> nn.Module | None:
    """The module inside `torch.compile(module)`; None for other modules."""
    return module._modules.get("_orig_mod") if type(module).__name__ == "OptimizedModule" else None


def stand_in(module: nn.Module, children: dict[str, nn.Module | None], run: Callable[..., Any] | None) -> nn.Module:
    """A module with the same parameters and buffers, other children, and `run(self, ...)` as its call.

    Of weights that are spread over ranks it has the part of this rank.
    """
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    if is_spread(module):
        view.__dict__["_parameters"] = {name: here(weight) for name, weight in module._parameters.items()}
    view.__dict__["_modules"] = children
    view.__dict__.pop("forward", None)
    # torch calls this instead of forward and all hooks, global ones included.
    view.__dict__["_compiled_call_impl"] = MethodType(type(module).forward if run is None else run, view)
    return view


def _silenced(module: nn.Module) -> nn.Module:
    while (inner := compiled_from(module)) is not None:
        module = inner
    children = {name: child if child is None else _silenced(child) for name, child in module._modules.items()}
    return stand_in(module, children, None)
