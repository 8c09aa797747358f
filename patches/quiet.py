"""Calling a part of a model beside its forward pass: no hook runs, and the model is as it was before.

Hooks belong to whoever registered them, and expect what the model computes, not what is only predicted. They can
neither be taken off for a moment (other threads use the model) nor told apart. So the function that the part's class
defines is called, past the hooks, past what accelerate or anybody else put in place of `forward`, and past
torch.compile. A part made of others, such as a LoRA layer, is stood in for where one of these has anything to pass by.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from scout_hf.errors import UnsupportedModelError

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
"""Packages whose layers give the same for the same input, however often they are called."""

OBSERVERS = "torch.ao.quantization"
"""Except these, which note the range of what passes through them."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def call(owner: nn.Module, name: str, *args: Any) -> Tensor:
    """What `getattr(owner, name)(*args)` gives, without running a hook or changing the module.

    Raises:
        UnsupportedModelError: a call could change the module, as far as one can tell.
    """
    module = getattr(owner, name)
    kind = type(module)
    if module._modules:
        module = quiet(module, owner)
        return type(module).forward(module, *args)
    check(module, owner)
    return kind.forward(module, *args)


def quiet(module: nn.Module, owner: nn.Module) -> nn.Module:
    """A module of several parts, or a stand-in for it, all of whose parts are called without hooks."""
    while (inner := compiled_from(module)) is not None:
        module = inner
    bare = not torch_module._has_any_global_hook()
    for part in module.modules():
        check(part, owner)
        bare = bare and (part is module or is_bare(part))
    return module if bare else _silenced(module)


def check(module: nn.Module, owner: nn.Module) -> None:
    """Refuse a module that a call could change, or whose weights accelerate brings only for the layer's own pass."""
    if not is_known(type(module), owner):
        reason = "of an unknown package: calling it once more than the model does might change it"
    elif module.training and (getattr(module, "p", False) or _notes_what_passes(module)):
        reason = "in training mode: it would draw random numbers or note what passes"
    elif any(weight is not None and weight.is_meta for weight in module._parameters.values()):
        reason = "without weights now: they come with the layer's own pass"
    else:
        return
    kind = type(module)
    raise UnsupportedModelError(f"{kind.__module__}.{kind.__qualname__} in {type(owner).__name__} is {reason}")


def _notes_what_passes(module: nn.Module) -> bool:
    # What transformers' own parts keep in buffers (angles, tables) is the same in training.
    return bool(module._buffers) and not type(module).forward.__module__.startswith("transformers.")


def is_known(kind: type[nn.Module], owner: nn.Module) -> bool:
    """Whether modules of this class may be called at any time: a known package's, or of the model's own files."""
    home = kind.forward.__module__
    if home.partition(".")[0] in KNOWN:
        return not home.startswith(OBSERVERS)
    return package(home) == package(type(owner).__module__)


def package(module_name: str) -> str:
    """The package of a module; a module outside packages stands for itself."""
    return module_name.rpartition(".")[0] or module_name


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module runs what its class defines and nothing else."""
    inside = module.__dict__
    return not ("forward" in inside or inside.get("_compiled_call_impl") or has_hooks(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether torch runs something before or after the module's own function."""
    return any(module.__dict__[hooks] for hooks in _HOOKS)


def is_replaced(module: nn.Module) -> bool:
    """Whether somebody put another function in place of `forward`; accelerate's only brings tensors and weights."""
    if "forward" not in module.__dict__:
        return False
    return not type(module.__dict__.get("_hf_hook")).__module__.startswith("accelerate.")


def compiled_from(module: nn.Module) -> nn.Module | None:
    """What `torch.compile(module)` was given; None for a module that does not come from there."""
    return module._modules.get("_orig_mod") if type(module).__name__ == "OptimizedModule" else None


def stand_in(module: nn.Module, children: dict[str, nn.Module | None], run: Callable[..., Any] | None) -> nn.Module:
    """A module with the same parameters and buffers, other children, and `run(self, ...)` as all that a call does."""
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    view.__dict__["_modules"] = children
    view.__dict__.pop("forward", None)
    # What torch calls in place of everything, hooks of all modules included.
    view.__dict__["_compiled_call_impl"] = MethodType(type(module).forward if run is None else run, view)
    return view


def _silenced(module: nn.Module) -> nn.Module:
    while (inner := compiled_from(module)) is not None:
        module = inner
    children = {name: child if child is None else _silenced(child) for name, child in module._modules.items()}
    return stand_in(module, children, None)
