"""A state as JSON with tensors and pages beside it, and back. Nothing but data is made of what is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from scout_hf.errors import SavingError, SessionError
from scout_hf.stores.state import Pages, State

KIND = "~"
"""Marks what JSON has no word for."""


@dataclass
class Flat:
    """A state in parts: what JSON can hold, and by name the tensors and pages that it refers to."""

    tree: Any = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    pages: dict[str, Pages] = field(default_factory=dict)
    seen: dict[Any, str] = field(default_factory=dict, repr=False)


def flatten(state: State) -> Flat:
    """Take a state apart.

    Raises
    ------
    SavingError
        If it holds something that is not data.
    """
    flat = Flat()
    flat.tree = _flattened(state, flat, "")
    return flat


def _flattened(value: Any, flat: Flat, path: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        # What several layers share is held once.
        name = flat.seen.setdefault((value.data_ptr(), value.dtype, value.shape, value.stride()), path)
        flat.tensors[name] = value
        return {KIND: "tensor", "name": name}
    if isinstance(value, Pages):
        flat.pages[path] = value
        return {KIND: "pages", "name": path}
    if isinstance(value, torch.dtype):
        return {KIND: "dtype", "name": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {KIND: "device"}
    if isinstance(value, (list, tuple)):
        found = [_flattened(one, flat, f"{path}/{place}") for place, one in enumerate(value)]
        return found if isinstance(value, list) else {KIND: "tuple", "of": found}
    if isinstance(value, dict):
        if all(isinstance(name, str) and name != KIND for name in value):
            return {name: _flattened(one, flat, f"{path}/{name}" if path else name) for name, one in value.items()}
        if all(type(name) is int for name in value):
            found = [[name, _flattened(one, flat, f"{path}/{name}")] for name, one in value.items()]
            return {KIND: "map", "of": found}
    raise SavingError(f"{path or 'a state'} cannot be saved: it is of type {type(value).__name__}")


def unflatten(flat: Flat, device: torch.device) -> Any:
    """Put a state together again; what was saved as a device becomes ``device``.

    Raises
    ------
    SessionError
        If it refers to something that is not there.
    """
    return _unflattened(flat.tree, flat, device)


def _unflattened(value: Any, flat: Flat, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_unflattened(one, flat, device) for one in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(KIND)
    if kind is None:
        return {name: _unflattened(one, flat, device) for name, one in value.items()}
    if kind == "tensor":
        return _named(flat.tensors, value)
    if kind == "pages":
        return _named(flat.pages, value)
    if kind == "device":
        return device
    if kind == "dtype":
        found = getattr(torch, str(value.get("name")), None)
        if isinstance(found, torch.dtype):
            return found
    of = value.get("of")
    if isinstance(of, list):
        if kind == "tuple":
            return tuple(_unflattened(one, flat, device) for one in of)
        if kind == "map" and all(isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int for pair in of):
            return {name: _unflattened(one, flat, device) for name, one in of}
    raise SessionError(f"a part of the session cannot be read: {value!r:.200}")


def _named(found: Mapping[str, Any], value: Mapping[str, Any]) -> Any:
    name = value.get("name")
    if not isinstance(name, str) or name not in found:
        raise SessionError(f"the session refers to {name!r}, which it does not hold")
    return found[name]
