"""The transformers model inside wrappers, which is the one to patch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from scout_hf.errors import UnsupportedModelError


def unwrapped(model: Any) -> Any:
    """The transformers model inside ``torch.compile``, PEFT, DataParallel and DistributedDataParallel, in any order.

    Raises
    ------
    UnsupportedModelError
        For other wrappers, also if they forward all attributes of the model: a patch of the wrapper would not reach it.
    """
    while (inner := _inside(model)) is not model:
        model = inner
    if isinstance(model, torch.nn.Module) and not isinstance(model, PreTrainedModel):
        _refuse_wrapper(model)
    return model


def _inside(model: Any) -> Any:
    # By name: torch keeps the class in a private module.
    if type(model).__name__ == "OptimizedModule" and "_orig_mod" in model._modules:
        return model._orig_mod
    if isinstance(model, DataParallel) and len(model.device_ids) > 1:
        raise UnsupportedModelError(
            f"DataParallel over {len(model.device_ids)} devices runs copies of the model that would share one cache; "
            "patch one model per process, or use device_map='auto' for one model on several devices"
        )
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return model.module
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) and not isinstance(model, type) else model


def _refuse_wrapper(model: torch.nn.Module) -> None:
    kind = type(model).__name__
    if kind == "FullyShardedDataParallel":
        raise UnsupportedModelError(
            f"{kind} shards the weights of its layers, which scout_hf reads; use device_map='auto' instead"
        )
    held = [(path, part) for path, part in model.named_modules() if path and isinstance(part, PreTrainedModel)]
    if held:
        path, part = held[0]
        raise UnsupportedModelError(
            f"{kind} is an unknown wrapper around a {type(part).__name__}; patch the model inside it, "
            f"scout_hf.patch(model.{path}), and {kind} runs it patched"
        )
    if hasattr(model, "config"):
        raise UnsupportedModelError(
            f"{kind} is not a transformers model (PreTrainedModel), though it has the config of one; if it is a "
            "wrapper, patch the model inside it"
        )
