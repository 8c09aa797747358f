"""Running code that keeps tensors between forward passes, independent of the caller's mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def keeps_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: runs a function outside torch.compile, whose graphs cannot hold state, and outside inference mode.

    A tensor made under ``torch.inference_mode()`` cannot be written to outside it, so a cache filled there could not be
    used outside.
    """

    @torch.compiler.disable
    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return outside
