"""The numbers that a model computes with, by name, also where weights are quantised; nothing of the model changes."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from scout_hf.ranks import here

Part = tuple[str, Any]
"""A name, and a plain tensor or a word about one."""

DYNAMIC = "torch.ao.nn.quantized.dynamic."
"""Home of layers whose weights are packed where only their own code reads them."""

PACKED_ROWS, COUNTED = 32, 4
"""bitsandbytes mixes 4-bit codes of so many rows, and only these; so many groups of them are counted."""


def weights_of(model: nn.Module) -> Iterator[Part]:
    """Every weight and buffer that is part of a checkpoint, in plain tensors, sorted by name.

    ``model.state_dict()`` is not asked: on a CPU, bitsandbytes answers by turning its 4-bit weights into another order,
    and their scales not, so that the model is broken afterwards.
    """
    held: dict[str, Any] = {}
    asked: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if type(module).__module__.startswith(DYNAMIC) and hasattr(module, "in_features"):
            held[prefix + "answer"] = _answer(module)
            asked.add(path)
        elif path.rpartition(".")[0] not in asked:
            held |= {prefix + name: value for name, value in _of_module(module).items()}
    for name, value in sorted(held.items()):
        yield from _parts(name, value)


def _of_module(module: nn.Module) -> dict[str, Any]:
    temporary = module._non_persistent_buffers_set
    held: dict[str, Any] = {name: weight for name, weight in module._parameters.items() if weight is not None}
    held |= {name: one for name, one in module._buffers.items() if one is not None and name not in temporary}
    if qtype := getattr(module, "weight_qtype", None):
        held["weight_qtype"] = f"{qtype}"  # of quanto, which may quantise in every pass
    own = type(module)._save_to_state_dict is not nn.Module._save_to_state_dict
    if own and not any(map(_is_whole, held.values())):
        saved: dict[str, Any] = {}
        module._save_to_state_dict(saved, "", keep_vars=True)
        held |= saved
    return held


@torch.no_grad()
def _answer(module: Any) -> torch.Tensor:
    """What a layer makes of the same small whole numbers; to unpack its weights takes a second for 100M of them."""
    numbers = torch.arange(module.in_features, dtype=torch.float32, device="cpu")
    return type(module).forward(module, (numbers * 37 % 255 - 127).view(1, -1))


def _is_whole(weight: Any) -> bool:
    return is_traceable_wrapper_subclass(weight) or _is_4bit(weight)


def _parts(name: str, value: Any) -> Iterator[Part]:
    if isinstance(value, (tuple, list)):
        for index, one in enumerate(value):
            yield from _parts(f"{name}.{index}", one)
    elif isinstance(value, str):
        yield name, value
    elif not isinstance(value, torch.Tensor):
        return
    elif value.is_meta:
        yield name, value
    elif hasattr(value, "to_local"):
        yield from _parts(name, here(value))
    elif is_traceable_wrapper_subclass(value):
        inner, about = value.__tensor_flatten__()
        yield name, f"{type(value).__qualname__} {tuple(value.shape)} {value.dtype} {_described(about)}"
        for one in inner:
            yield from _parts(f"{name}.{one}", getattr(value, one))
    elif _is_4bit(value):
        yield from _of_4bit(name, value)
    elif value.is_quantized:
        yield f"{name}.integers", value.int_repr()
        by_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric)
        scale = None if by_channel else torch.tensor(value.q_scale(), dtype=torch.float64, device="cpu")
        yield f"{name}.scales", value.q_per_channel_scales() if scale is None else scale
    else:
        yield name, value


def _is_4bit(value: Any) -> bool:
    return getattr(value, "quant_state", None) is not None


def _of_4bit(name: str, weight: Any) -> Iterator[Part]:
    """The same for both orders in which bitsandbytes keeps codes and scales, before a first pass and after it."""
    state, shape = weight.quant_state, tuple(weight.quant_state.shape)
    packed, absmax = getattr(state, "packing_format_for_cpu", False), state.absmax
    if packed:
        absmax = absmax.T
    elif state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    dtype = state.original_dtype if packed else state.dtype
    yield name, f"{state.quant_type} {state.blocksize} {shape} {dtype}"
    yield f"{name}.absmax", absmax.reshape(-1).to(torch.bfloat16)
    codes = weight.data.contiguous().view(torch.uint8).view(-1)
    groups = codes.split(PACKED_ROWS * max(1, shape[-1] // 2))
    chosen = torch.stack([_counted(one) for one in groups[:: max(1, len(groups) // COUNTED)]])
    yield f"{name}.counts", chosen


def _counted(codes: torch.Tensor) -> torch.Tensor:
    counts = torch.bincount(codes, minlength=256).view(16, 16)
    return counts.sum(0) + counts.sum(1)


def _described(value: Any) -> str:
    """The same words in every process: no addresses."""
    if isinstance(value, enum.Enum):
        return str(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)} | {"": type(value)}
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_described(one)}" for key, one in sorted(value.items())) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_described, value)) + "]"
    if isinstance(value, type):
        return value.__qualname__
    simple = value is None or isinstance(value, (str, int, float, torch.dtype))
    return repr(value) if simple else type(value).__qualname__
