"""A ScoutCache as a session on disk, and back."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from scout_hf.cache_layer import ScoutLayer
from scout_hf.config import ScoutConfig
from scout_hf.errors import ConfigError, SavingError, ScoutError, SessionError
from scout_hf.ranks import FOLDERS, Ranks
from scout_hf.recall_intervals import RecallIntervals
from scout_hf.session_file import ABOUT
from scout_hf.sessions import fingerprint, read_session, write_session
from scout_hf.sessions.folder import PRIVATE
from scout_hf.stores.state import State, count_in, maybe_tensor_in, state_in, tensor_in
from scout_hf.token_log import Held

if TYPE_CHECKING:
    from scout_hf.cache import ScoutCache

CHUNK_TOKENS = 4096
KEEP_STATE = ("method", "block_size", "host_dtype", "split", "window", "method_options", "dense_layers")
"""Settings that decide what a layer holds; if one differs, keys and values alone are taken."""

WITH_RESIDENTS = ("budget", "resident", "gpu_kernels", "hand_over")
"""Settings that decide which blocks are resident."""


def save(
    cache: ScoutCache, path: str | os.PathLike[str], model: Any, token_ids: bool, unchanged: Callable[[], None]
) -> None:
    """Write a cache as a session; see :meth:`ScoutCache.save`. ``unchanged`` raises if what was written is void."""
    model = cache.filled_by() if model is None and cache.filled_by is not None else model
    if model is None:
        raise SavingError(
            "this cache was filled by no patched model, or that model is gone: pass the model that its keys and values "
            "are of, cache.save(path, model)"
        )
    if not any(layer.get_seq_length() for layer in cache.layers if isinstance(layer, CacheLayerMixin)):
        raise SavingError("this cache holds no tokens: there is nothing to save")
    known = cache.log.held(cache.get_seq_length(), cache.guard.changes) if token_ids else None
    state = {
        "layers": [state_of(layer) for layer in cache.layers],
        "depth": cache.depth,
        "known": None if known is None else known._asdict(),
    }
    about = {"tokens": cache.get_seq_length(), "rows": _rows(cache)}
    place = _own_folder(path, Ranks(model))
    write_session(place, fingerprint(model).as_json(), settings_as_json(cache.scout_config), state, about, unchanged)


def load(kind: type[ScoutCache], path: str | os.PathLike[str], model: Any, options: dict[str, Any]) -> ScoutCache:
    """Open a session as a cache; see :meth:`ScoutCache.load`."""
    place = _part_of(path, Ranks(model))
    session, name = read_session(place), f"session {place}"
    fingerprint(model).refuse(session.model, name)
    before = settings_from_json(session.settings)
    config = ScoutConfig.from_options(before, **options)
    try:
        cache = kind(model.config, config)
    except ConfigError as error:
        if options:
            raise
        raise SessionError(f"{name} has settings that cannot be used: {error}") from error
    layers = session.state.get("layers") if isinstance(session.state, dict) else None
    if not isinstance(layers, list) or len(layers) != len(cache.layers):
        raise SessionError(f"{name} does not have the layers of this model; save it again")
    try:
        for layer, state, device in zip(cache.layers, layers, devices_of(model, len(layers))):
            load_layer(layer, state, device, before)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ScoutError) and not isinstance(error, ConfigError):
            raise
        raise SessionError(f"{name} cannot be used: {error}") from error
    sizes = {(layer.get_seq_length(), layer.method and layer.method.batch) for layer in cache.scout_layers}
    if len(sizes) > 1:
        raise SessionError(f"{name} cannot be used: its layers hold different numbers of tokens or rows, {sizes}")
    if session.state.get("known") is not None:
        cache.log.take(_known(state_in(session.state, "known"), cache.get_seq_length()), cache.guard.changes)
    cache.files = () if session.file is None else (session.file,)
    cache.filled_by = weakref.ref(model)
    return cache


def _own_folder(path: str | os.PathLike[str], ranks: Ranks) -> Path:
    """Where a rank saves its part; the folder of all of them is made."""
    if ranks.size > 1:
        if (Path(path) / ABOUT).exists():
            raise SavingError(f"{path} is a session of one process, and this is {ranks}; take another name")
        Path(path).mkdir(PRIVATE, exist_ok=True)
    return ranks.folder(path)


def _part_of(path: str | os.PathLike[str], ranks: Ranks) -> Path:
    """Where the part of a rank was saved; SessionError if other numbers of ranks have saved something."""
    place, whole = ranks.folder(path), (Path(path) / ABOUT).exists()
    others = sorted(one.name for one in Path(path).glob(FOLDERS))
    if whole and ranks.size > 1:
        raise SessionError(
            f"{path} is a session of one process, and this is {ranks}, which has a part of the KV heads only; load it "
            "in one process, or read the text again"
        )
    if others and not whole and place.name not in others:
        this = ranks if ranks.size > 1 else "one process"
        raise SessionError(
            f"{path} holds parts of a session, {', '.join(others)}, and this is {this}; load it with as many processes "
            "as saved it"
        )
    return place


def _known(state: State, tokens: int) -> Held:
    ids = tensor_in(state, "ids", (None, tokens), torch.int64)
    mask = maybe_tensor_in(state, "mask", tuple(ids.shape), torch.bool)
    return Held(ids, mask, count_in(state, "exact", tokens))


def _rows(cache: ScoutCache) -> int | None:
    return next((layer.method.batch for layer in cache.scout_layers if layer.method is not None), None)


def state_of(layer: Any) -> State:
    """What a layer holds, as :func:`load_layer` takes it."""
    if isinstance(layer, ScoutLayer):
        return {"kind": "scout", "state": layer.state_dict()}
    return {"kind": type(layer).__name__, "state": dict(vars(layer))}


def load_layer(layer: Any, state: Any, device: torch.device, before: ScoutConfig) -> None:
    """Fill a layer without tokens with what :func:`state_of` gave, under the settings ``before``.

    Raises
    ------
    SessionError
        If it does not fit.
    """
    kind = "scout" if isinstance(layer, ScoutLayer) else type(layer).__name__
    if not isinstance(state, dict) or state.get("kind") != kind:
        raise SessionError(f"a layer is a {kind} here and something else in the session; save it again")
    if not isinstance(layer, ScoutLayer):
        layer.__dict__.update(_on(state_in(state, "state"), device))
        return
    held = state.get("state")
    if held is None:
        return
    if not isinstance(held, dict):
        raise SessionError("a layer of the session has no state")
    config = layer.config
    if any(getattr(config, name) != getattr(before, name) for name in KEEP_STATE):
        _take_tokens(layer, held, device, before)
    else:
        if any(getattr(config, name) != getattr(before, name) for name in WITH_RESIDENTS):
            held = held | {"method": state_in(held, "method") | {"slots": None, "residents": None}}
        layer.load_state_dict(held, device)
    layer.load_states(held, device)


def _take_tokens(layer: ScoutLayer, held: State, device: torch.device, before: ScoutConfig) -> None:
    """Keys and values of a session with other settings: in memory, with digests made anew."""
    there = layer.empty_twin(before)
    there.load_state_dict(held, device)
    method = there.method
    if method is None:
        return
    kv, tokens = method.kv, method.length
    chunks = (kv.read(start, min(start + CHUNK_TOKENS, tokens)) for start in range(0, tokens, CHUNK_TOKENS))
    layer.take(chunks, there.layout)


def _on(state: State, device: torch.device) -> State:
    """The attributes of a stock layer on a device."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, torch.device):
            return device
        if isinstance(value, dict):
            return {name: moved(one) for name, one in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(moved(one) for one in value)
        return value

    if any(name.startswith("__") for name in state):
        raise SessionError("a layer of the session has attributes that no layer has")
    return {name: moved(value) for name, value in state.items()}


def devices_of(model: Any, layers: int) -> list[torch.device]:
    """The device of each layer of a model, which ``device_map`` may have spread."""
    spread = getattr(model, "hf_device_map", None)
    if not spread or len(set(spread.values())) < 2:
        return [model.device] * layers
    found = [model.device] * layers
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        weight = next(module.parameters(), None)
        if isinstance(index, int) and 0 <= index < layers and weight is not None and not weight.is_meta:
            found[index] = weight.device
    return found


def settings_as_json(config: ScoutConfig) -> dict[str, Any]:
    """Fields of a config as JSON has them."""
    made = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, RecallIntervals):
            value = {"recall_intervals": dataclasses.asdict(value) | {"intervals": list(value.intervals)}}
        made[field.name] = list(value) if isinstance(value, tuple) else value
    return made


def settings_from_json(made: dict[str, Any]) -> ScoutConfig:
    """Undo :func:`settings_as_json`; SessionError if a field is unknown or not allowed."""
    options: dict[str, Any] = {}
    try:
        for name, value in made.items():
            if isinstance(value, dict) and set(value) == {"recall_intervals"}:
                value = RecallIntervals(**value["recall_intervals"])
            options[name] = tuple(value) if isinstance(value, list) else value
        return ScoutConfig(**options)
    except (ConfigError, TypeError) as error:
        raise SessionError(f"the settings of the session cannot be used: {error}") from error
