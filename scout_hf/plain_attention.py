"""Which attention functions are known to be plain causal softmax attention.

Decode steps use scout_hf's kernels, prompts the model's own attention function. If that function computes something
else, the two would differ. So only known functions are accepted.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import modeling_flash_attention_utils, modeling_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from scout_hf.errors import UnsupportedModelError

KERNELS = frozenset(getattr(modeling_flash_attention_utils, "FLASH_ATTN_KERNEL_FALLBACK", {}).values())
_FLASH = re.compile(r"flash_attention_\d")
_EAGER, _TABLE = "eager_attention_forward", "ALL_ATTENTION_FUNCTIONS"


def attention_function(name: str, module: torch.nn.Module) -> Callable[..., tuple[Any, ...]]:
    """The attention function of ``module`` under the implementation ``name``, looked up as its model's file does."""
    # Base classes are searched too: users and FSDP subclass attention in modules of their own.
    homes = [sys.modules.get(cls.__module__) for cls in type(module).__mro__]
    table = next((found for home in homes if (found := getattr(home, _TABLE, None)) is not None), None)
    table = modeling_utils.ALL_ATTENTION_FUNCTIONS if table is None else table
    if name != "eager" or name in table:
        return table[name if name in table else name.removeprefix("paged|")]
    return next(found for home in homes if (found := getattr(home, _EAGER, None)) is not None)


def prompt_function(name: str, module: torch.nn.Module, special: bool) -> tuple[str, Callable[..., tuple[Any, ...]]]:
    """Name and function of the implementation for a whole prompt: the model's own if it is known to be plain.

    Else sdpa, or eager attention for softcaps and sinks (``special``).
    """
    name = name.removeprefix("paged|")
    if name != "flex_attention" and why_not_plain(name, module) is None:
        return name, attention_function(name, module)
    if not special:
        return "sdpa", sdpa_attention_forward
    if (reason := why_not_plain("eager", module)) is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with soft caps or sinks, which only eager attention knows, and {reason}"
        )
    return "eager", attention_function("eager", module)


def prompt_mask_function(name: str) -> Callable[..., Any]:
    """The mask function that belongs to the function of ``prompt_function``."""
    mask = ALL_MASK_ATTENTION_FUNCTIONS.get(name.removeprefix("paged|"))
    return mask if mask is not None and _is_known(name) and _is_of(mask, "transformers") else sdpa_mask


def why_not_plain(name: str, module: torch.nn.Module) -> str | None:
    """Why the attention of ``module`` under the implementation ``name`` is not known to be plain, or None if it is."""
    name = name.removeprefix("paged|")
    if not _is_known(name):
        return f"its attention implementation {name!r} is none of transformers' own"
    try:
        function = attention_function(name, module)
    except (KeyError, StopIteration):
        return f"no function is registered for its attention implementation {name!r}"
    if not (_is_of(function, "transformers") or name == "eager" and _is_of(function, _home(module))):
        return f"the function of its attention implementation {name!r} was replaced by {_origin(function)}"
    mask = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if mask is not None and not _is_of(mask, "transformers"):
        return f"the mask function of its attention implementation {name!r} was replaced by {_origin(mask)}"
    if name == "eager" and getattr(module, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn=True changes its eager attention; sdpa ignores that setting"
    return None


def seen(name: str, module: torch.nn.Module) -> tuple[Any, ...]:
    """A cheap key: while it is unchanged, so is the answer of ``why_not_plain``."""
    name = str(name)
    try:
        function = attention_function(name, module)
    except (KeyError, StopIteration):
        function = None
    return name, function, ALL_MASK_ATTENTION_FUNCTIONS.get(name)


def is_of_transformers(module: torch.nn.Module) -> bool:
    """Whether the ``forward`` of the class of ``module`` is code of transformers; users replace it too."""
    return f"{_home(module)}.".startswith("transformers.")


def _is_known(name: str) -> bool:
    name = name.removeprefix("paged|")
    return name in ("eager", "sdpa", "flex_attention") or name in KERNELS or _FLASH.fullmatch(name) is not None


def _home(module: torch.nn.Module) -> str:
    """The file, as a module's name, that defines how ``module`` attends."""
    return _code_home(inspect.unwrap(type(module).forward))


def _is_of(function: Any, package: str) -> bool:
    """Whether the code of ``function``, and of all that it wraps, is from ``package``, whatever its ``__module__``."""
    while function is not None:
        origin = _code_home(function)
        if origin != package and not origin.startswith(f"{package}."):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _code_home(function: Any) -> str:
    return getattr(_called(function), "__globals__", {}).get("__name__", "")


def _origin(function: Any) -> str:
    # From its code object: wrappers copy the name of the wrapped function.
    code = getattr(_called(function), "__code__", None)
    name = type(function).__name__ if code is None else code.co_name
    return f"{name} of {_code_home(function) or type(function).__module__}"


def _called(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function
