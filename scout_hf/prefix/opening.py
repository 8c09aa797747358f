"""Filling an empty cache with what the store knows of its texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scout_hf.cache import ScoutCache
from scout_hf.cache_layer import ScoutLayer
from scout_hf.cache_reading import KV
from scout_hf.cache_saving import CHUNK_TOKENS, devices_of, load_layer, settings_from_json
from scout_hf.compat.shared_kv import holds_nothing
from scout_hf.errors import SessionError
from scout_hf.prefix.states import join, repeated, with_tensors
from scout_hf.prefix.store import Piece
from scout_hf.sessions import Session, read_session
from scout_hf.stores.state import State
from scout_hf.token_log import Held


@dataclass(frozen=True)
class Found:
    """What the store knows of a batch.

    Attributes
    ----------
    pieces : tuple of (tuple of Piece) per row
        Of the beginning of each row's text.
    padding : tuple of int
        Tokens of padding at the left of each row.
    tokens : int
        Tokens that every row can be given, padding included.
    """

    pieces: tuple[tuple[Piece, ...], ...]
    padding: tuple[int, ...]
    tokens: int

    @property
    def shares_one(self) -> bool:
        """Whether all rows begin with the same text and without padding, so that they can share its pages."""
        return not any(self.padding) and len(set(self.pieces)) == 1


def until(pieces: Sequence[Piece], tokens: int, block_size: int) -> tuple[Piece, ...]:
    """What of these pieces is needed for the first ``tokens`` tokens of a row."""
    blocks = -(-tokens // block_size)
    return tuple(Piece(piece.segment, min(piece.end, blocks)) for piece in pieces if piece.segment.first < blocks)


def fill(cache: ScoutCache, model: Any, found: Found, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Give an empty cache the first ``found.tokens`` tokens of each row.

    Parameters
    ----------
    cache : ScoutCache
    model : PreTrainedModel
    found : Found
    ids : Tensor (batch, at least found.tokens) of int64
    mask : Tensor of the same shape, or None
        False or 0 for padding.

    Raises
    ------
    SessionError
        If a segment is damaged or has left; the cache is empty as before.
    """
    sessions = {piece.segment.path: read_session(piece.segment.path) for row in found.pieces for piece in row}
    devices = devices_of(model, len(cache.layers))
    try:
        made = [
            _layer(cache, index, found, sessions, device) for index, device in zip(range(len(cache.layers)), devices)
        ]
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, SessionError):
            raise
        raise SessionError(f"a text of the store cannot be used: {error!r}") from error
    files = tuple(session.file for session in sessions.values() if session.file is not None)
    with cache.guard.changing("filling it from the store"):
        cache.files = files  # first: pages are checked by them
        for layer, one in zip(cache.layers, made):
            layer.__dict__.update(one)
    tokens = found.tokens
    known = None if mask is None else mask[:, :tokens].cpu().bool()
    held = Held(ids[:, :tokens].cpu(), None if known is None or bool(known.all()) else known, tokens)
    cache.log.take(held, cache.guard.changes)


def _layer(
    cache: ScoutCache, index: int, found: Found, sessions: dict[Any, Session], device: torch.device
) -> dict[str, Any]:
    """The attributes that a layer gets."""
    layer, rows = cache.layers[index], len(found.pieces)
    if holds_nothing(layer):
        return {}
    if not isinstance(layer, ScoutLayer):
        last = sessions[found.pieces[0][-1].segment.path]
        fresh = object.__new__(type(layer))
        fresh.__dict__.update(layer.__dict__)
        load_layer(fresh, _state(last, index), device, settings_from_json(last.settings))
        if "record_past" in vars(layer):
            fresh.__dict__["record_past"] = vars(layer)["record_past"]
        return {name: with_tensors(value, lambda tensor: repeated(tensor, rows)) for name, value in vars(fresh).items()}
    if found.shares_one:
        fresh = _row(layer, found.pieces[0], found.tokens, sessions, device)
        if rows > 1 and fresh.method is not None:
            fresh.method.select_rows(torch.zeros(rows, dtype=torch.int64, device="cpu"))
        return _taken(fresh)
    parts = [
        _row(layer, pieces, found.tokens - padding, sessions, device) if pieces else None
        for pieces, padding in zip(found.pieces, found.padding)
    ]
    fresh = ScoutLayer(cache.scout_config, index, cache.guard, layer.memory)
    known = [part.method for part in parts if part is not None and part.method is not None]
    layout = next(part.layout for part in parts if part is not None)
    fresh.take(_beside(parts, found.padding, found.tokens), layout, known if len(known) == rows else [])
    return _taken(fresh)


def _row(
    layer: ScoutLayer,
    pieces: Sequence[Piece],
    tokens: int,
    sessions: dict[Any, Session],
    device: torch.device,
) -> ScoutLayer:
    held = [sessions[piece.segment.path] for piece in pieces]
    states = [_state(session, layer.layer_idx) for session in held]
    ends = [piece.end - piece.segment.first for piece in pieces]
    digest = pieces[0].segment.digest
    coded = next((place for place, piece in enumerate(pieces) if piece.segment.digest != digest), len(pieces))
    joined = join([state.get("state") or {} for state in states], ends, coded)
    fresh = ScoutLayer(layer.config, layer.layer_idx, layer.guard, layer.memory)
    load_layer(fresh, states[-1] | {"state": joined}, device, settings_from_json(held[-1].settings))
    if fresh.method is None or fresh.method.length < tokens:
        raise SessionError("a text of the store holds fewer tokens than it says")
    if fresh.method.length > tokens:
        fresh.method.crop(tokens)
    return fresh


def _beside(parts: Sequence[ScoutLayer | None], padding: Sequence[int], tokens: int) -> Iterator[KV]:
    """Keys and values of rows with different texts or padding, chunk by chunk; padding is 0."""
    methods = [None if part is None else part.method for part in parts]
    like = next(part for part in parts if part is not None)
    for start in range(0, tokens, CHUNK_TOKENS):
        stop = min(start + CHUNK_TOKENS, tokens)
        heads, dim = like.sizes
        shape = (len(parts), heads, stop - start, dim)
        both = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2)]
        for row, (method, left) in enumerate(zip(methods, padding)):
            if method is not None and stop > left:
                held = method.kv.read(max(0, start - left), stop - left)
                for whole, part in zip(both, held):
                    whole[row, :, max(0, left - start) :] = part[0]
        yield both[0], both[1]


def _taken(fresh: ScoutLayer) -> dict[str, Any]:
    names = ("method", "dtype", "device", "sizes", "layout")
    return {name: fresh.__dict__[name] for name in names if name in fresh.__dict__}


def _state(session: Session, index: int) -> State:
    layers = session.state.get("layers") if isinstance(session.state, dict) else None
    if not isinstance(layers, list) or index >= len(layers) or not isinstance(layers[index], dict):
        raise SessionError("a text of the store does not have the layers of this model")
    return layers[index]
