"""Reading a ScoutCache as a DynamicCache: tensors per layer, iteration, a stock copy, the repr."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, SupportsIndex

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from scout_hf.errors import CacheStateError, SavingError

KV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values, (batch, kv_heads, tokens, head_dim) each."""


def refuse_saving(held: Any, protocol: SupportsIndex) -> NoReturn:
    """The ``__reduce_ex__`` of objects that hold pages of this process."""
    raise SavingError(
        f"a {type(held).__name__} cannot be pickled or sent to another process. Save it with cache.save(folder), or "
        "pickle cache.to_dynamic(), a DynamicCache for the unpatched model, or stay in this process and continue from "
        "cache.fork(). A file that was being written for it is incomplete"
    )


class ReadableLayer(CacheLayerMixin):
    """The ``keys``, ``values`` and ``is_initialized`` of a stock layer, on top of ``read`` of a subclass."""

    layer_idx: int = -1
    method: Any = None

    @abstractmethod
    def read(self) -> KV | tuple[None, None]:
        """Copies of the keys and values of all tokens, (batch, kv_heads, length, head_dim) each; None without tokens.

        Do not call it while another thread runs a pass with this cache: some tokens may be missing.
        """

    @property
    def keys(self) -> torch.Tensor | None:
        """Keys of all tokens, (batch, kv_heads, length, head_dim); None without tokens.

        Every access gathers a copy from all tiers: it is slow, and ``layer.keys[...] = x`` does not change the cache.
        Use ``cache.to_dynamic()`` to change tensors, and ``read`` for keys and values at once.
        """
        return self.read()[0]

    @keys.setter
    def keys(self, value: torch.Tensor | None) -> None:
        self._refuse("keys", value)

    @property
    def values(self) -> torch.Tensor | None:
        """Values of all tokens; see ``keys``."""
        return self.read()[1]

    @values.setter
    def values(self, value: torch.Tensor | None) -> None:
        self._refuse("values", value)

    @property
    def is_initialized(self) -> bool:
        """Whether it holds tokens."""
        return self.get_seq_length() > 0

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        self._refuse("is_initialized", value)

    def _refuse(self, name: str, value: Any) -> None:
        # The __init__ of transformers sets all three to the values of an empty layer.
        if self.method is None and (value is None or value is False):
            return
        raise CacheStateError(
            f"{name} of layer {self.layer_idx} cannot be set: a ScoutCache keeps KV in pages and in several tiers. "
            "Add tokens with cache.update(), remove tokens with cache.crop(), or change the tensors of "
            "cache.to_dynamic()"
        )

    def to_dynamic(self) -> DynamicLayer:
        """A stock layer with copies of the same tokens."""
        twin, (keys, values) = DynamicLayer(), self.read()
        if keys is not None and values is not None:
            twin.lazy_initialization(keys, values)
            twin.keys, twin.values = keys, values
        return twin

    __reduce_ex__ = refuse_saving

    def __copy__(self) -> ReadableLayer:
        # Shallow copies of stock layers are independent too: stock layers replace their tensors, never write to them.
        return copy.deepcopy(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.layer_idx}, {self.get_seq_length()} tokens)"


def iterate(cache: Cache) -> Iterator[tuple[Any, ...]]:
    """What iterating over the installed release's DynamicCache gives; a layer is gathered when it is reached."""
    for layer in cache.layers:
        stock = layer.to_dynamic() if isinstance(layer, ReadableLayer) else layer
        yield from _dynamic([stock])


def copy_as_dynamic(cache: Cache) -> DynamicCache:
    """A DynamicCache of the same tokens; stock layers are deep-copied."""
    return _dynamic(
        [layer.to_dynamic() if isinstance(layer, ReadableLayer) else copy.deepcopy(layer) for layer in cache.layers]
    )


def _dynamic(layers: list[Any]) -> DynamicCache:
    made = object.__new__(DynamicCache)
    Cache.__init__(made, layers=layers)
    return made


def describe(cache: Cache, ours: Sequence[ReadableLayer], settings: str, held: dict[str, int]) -> str:
    """One line: settings, tokens, rows, layers (``ours`` of all), bytes by tier."""
    attention = [layer for layer in cache.layers if isinstance(layer, CacheLayerMixin)]
    tokens = max((layer.get_seq_length() for layer in attention), default=0)
    parts = [settings, f"{tokens} tokens"]
    rows = next((layer.method.batch for layer in ours if layer.method is not None), None)
    if rows is not None:
        parts.append(f"{rows} {'row' if rows == 1 else 'rows'}")
    of = "" if len(ours) == len(cache.layers) else f" of {len(cache.layers)}"
    return f"{type(cache).__name__}({', '.join(parts)}, {len(ours)}{of} layers, bytes {held})"
