"""Adding what a cache has read to the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scout_hf.cache import ScoutCache
from scout_hf.cache_layer import ScoutLayer
from scout_hf.cache_reading import KV
from scout_hf.cache_saving import CHUNK_TOKENS, settings_as_json, state_of
from scout_hf.methods import Method
from scout_hf.prefix.hashing import HASH_BYTES, block_hashes
from scout_hf.prefix.states import bytes_in, constants_of, cut, one_row, paged_blocks, with_tensors
from scout_hf.prefix.store import PrefixStore

MANY = 16
"""Segments of one text beyond which those behind the first are written as one, as in a chat of many turns."""

Stop = tuple[int, list[Any]]
"""Tokens, and the states of stock layers after them (None for layers that methods keep)."""


@dataclass(frozen=True)
class Context:
    """What decides keys and values beside tokens.

    root : str
        One word for all of it.
    model : dict
        The fingerprint, as JSON.
    chain : str
        One word for the settings of what a layer holds.
    """

    root: str
    model: dict[str, Any]
    chain: str


def keep(store: PrefixStore, cache: ScoutCache, context: Context, stops: Sequence[Stop]) -> int:
    """Add the whole blocks of every row, as far as their keys and values are exact, that the store does not know.

    Parameters
    ----------
    store : PrefixStore
    cache : ScoutCache
        Between two passes.
    context : Context
    stops : sequence of (int, list)
        For caches with stock layers: where segments may end, ascending. Without stock layers empty.

    Returns
    -------
    int
        Tokens added, over all rows.

    Raises
    ------
    OSError
        If the store cannot be written to.
    """
    known = cache.log.held(cache.get_seq_length(), cache.guard.changes)
    if known is None:
        return 0
    size, added = cache.scout_config.block_size, 0
    for row in range(len(known.ids)):
        left = 0 if known.mask is None else int(known.mask[row].to(torch.uint8).argmax())
        if known.mask is not None and not bool(known.mask[row, left:].all()):
            continue  # padding inside
        hashes = block_hashes(known.ids[row, left : known.exact].numpy(), size, context.root)
        blocks = len(hashes) // HASH_BYTES
        ends: Sequence[tuple[int, list[Any] | None]] = [(blocks, None)]
        if cache.has_stock_layers:
            ends = [(tokens // size, states) for tokens, states in stops if tokens <= known.exact and not left]
        for end, states in ends:
            if end:
                text = known.ids[row : row + 1, left : left + end * size] if store.token_ids else None
                added += _keep_row(store, cache, context, (row, left), hashes[: end * HASH_BYTES], states, text)
    return added


def _keep_row(
    store: PrefixStore,
    cache: ScoutCache,
    context: Context,
    place: tuple[int, int],
    hashes: bytes,
    stock: list[Any] | None,
    ids: torch.Tensor | None,
) -> int:
    row, left = place
    size, end = cache.scout_config.block_size, len(hashes) // HASH_BYTES
    pieces = store.find(context.root, hashes, context.chain)
    whole = bool(pieces) and pieces[-1].end == end
    if whole and (stock is None or (pieces[-1].segment.states and pieces[-1].segment.end == end)):
        store.used(pieces)
        return 0
    twins = [_one_row(layer, row, left, end * size) for layer in cache.scout_layers]
    states = [layer.state_dict() or {} for layer in twins]
    first, coded, digest = 0, False, constants_of(states)
    if len(pieces) >= MANY:
        pieces = pieces[:1]
    if (
        pieces
        and pieces[0].segment.chain == context.chain
        and all(twin.method is not None and twin.method.blockwise for twin in twins)
    ):
        last = pieces[-1]
        first = min(last.end, last.segment.first + last.segment.paged, end - 1)
        coded = digest == pieces[0].segment.digest
    states = [cut(state, first, coded or not first) for state in states]
    scout, rows = iter(states), next(layer.method.batch for layer in cache.scout_layers if layer.method is not None)
    layers = [
        {"kind": "scout", "state": next(scout)}
        if isinstance(layer, ScoutLayer)
        else with_tensors(stock[index] if stock else None, lambda tensor: one_row(tensor, row, rows))
        for index, layer in enumerate(cache.layers)
    ]
    about = {
        "before": hashes[(first - 1) * HASH_BYTES : first * HASH_BYTES].hex() if first else "",
        "hashes": hashes[first * HASH_BYTES :].hex(),
        "first": first,
        "paged": paged_blocks(states),
        "states": stock is not None,
        "chain": context.chain,
        "digest": digest if coded or not first else "",
        "rows": 1,
        "tokens": end * size,
    }
    state = {"layers": layers, "depth": cache.depth, "known": None if ids is None else {"ids": ids}}
    written = store.write(
        context.root, context.model, settings_as_json(cache.scout_config), state, about, bytes_in(states)
    )
    store.used(pieces if first else [])
    return (end - first) * size if written else 0


def _one_row(layer: ScoutLayer, row: int, left: int, tokens: int) -> ScoutLayer:
    """A layer with the first ``tokens`` tokens of one row, without its padding."""
    twin = ScoutLayer(layer.config, layer.layer_idx)
    method = layer.method
    if method is None:
        return twin
    if left:
        twin.take(_chunks(method, row, left, left + tokens), layer.layout, [method], [row])
        return twin
    own = method.fork()
    if own.batch > 1:
        own.select_rows(torch.tensor([row], dtype=torch.int64, device="cpu"))
    if own.length > tokens:
        own.crop(tokens)
    twin.method, twin.dtype, twin.device, twin.sizes = own, layer.dtype, layer.device, layer.sizes
    twin.layout = layer.layout
    return twin


def _chunks(method: Method, row: int, start: int, stop: int) -> Iterator[KV]:
    for first in range(start, stop, CHUNK_TOKENS):
        keys, values = method.kv.read(first, min(first + CHUNK_TOKENS, stop))
        yield keys[row : row + 1].clone(), values[row : row + 1].clone()


def stock_states(cache: ScoutCache) -> list[Any]:
    """Copies of the states of stock layers, as they are now; None for the others."""
    return [
        None if isinstance(layer, ScoutLayer) else with_tensors(state_of(layer), lambda tensor: tensor.detach().clone())
        for layer in cache.layers
    ]
