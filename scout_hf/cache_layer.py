"""``ScoutLayer``: one full-attention layer of a ScoutCache."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from scout_hf.awaited import Awaited
from scout_hf.cache_reading import KV, ReadableLayer
from scout_hf.change_guard import ChangeGuard
from scout_hf.compat.modes import keeps_tensors
from scout_hf.config import ScoutConfig
from scout_hf.errors import SessionError
from scout_hf.fitting import refuse_other_sizes, refuse_unlike
from scout_hf.layouts import PLAIN, Layout, layout_from, layout_of
from scout_hf.methods import Method, make_method
from scout_hf.step import active_step
from scout_hf.stores.host_memory import HostMemory
from scout_hf.stores.state import State, count_in, state_in


class Incoming(NamedTuple):
    """New tokens between ``update`` and attention: the model's keys, and keys and values as they are stored."""

    given: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class ScoutLayer(ReadableLayer):
    """One full-attention layer: translates calls of transformers into calls of a method.

    Parameters
    ----------
    config : ScoutConfig
    layer_idx : int
        The layer of the model that stores its KV here.
    guard : ChangeGuard, optional
    memory : HostMemory, optional
    latent : tuple of int, optional
        Widths of what the model caches if that is a latent.
    readers : tuple of int
        Further layers that attend over this KV with queries of their own.

    Attributes
    ----------
    method : Method or None
        None without tokens.
    incoming : dict of int to Incoming
        In a pass: the new tokens, for each layer that has not attended to them yet.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(
        self,
        config: ScoutConfig,
        layer_idx: int,
        guard: ChangeGuard | None = None,
        memory: HostMemory | None = None,
        latent: tuple[int, int] | None = None,
        readers: tuple[int, ...] = (),
    ):
        super().__init__()
        self.memory, self.readers = memory, readers
        self.latent, self.layout = latent, PLAIN
        self.guard = guard or ChangeGuard()
        self.config, self.layer_idx = config, layer_idx
        self.method: Method | None = None
        self.incoming: dict[int, Incoming] = {}
        self.awaited: Awaited | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        layout = layout_of(key_states, value_states, self.latent)
        self._begin(layout.stored(key_states, value_states)[0], layout)

    def _begin(self, key_states: torch.Tensor, layout: Layout) -> Method:
        method = self._make(key_states)
        # Attributes that stock layers have once they hold tokens.
        self.dtype, self.device = key_states.dtype, key_states.device
        self.sizes = key_states.shape[1], key_states.shape[3]
        self.layout, self.method = layout, method
        return method

    def _make(self, like: torch.Tensor) -> Method:
        method = self._new_method(like)
        for pool in method.pools():
            if self.memory is not None and pool.device.type == "cpu" and not pool.pinned:
                pool.limit(self.memory)
        return method

    def _new_method(self, like: torch.Tensor) -> Method:
        return make_method(self.config, self.layer_idx, like)

    def method_of(self, layer_idx: int) -> Method | None:
        """The method of one of the layers that attend over this KV; None without tokens."""
        method = self.method
        if method is None or layer_idx == self.layer_idx:
            return method
        if layer_idx not in method.readers:
            heads, dim = self.sizes
            like = torch.empty((method.batch, heads, 0, dim), dtype=self.dtype, device=self.device)
            make_method(self.config, layer_idx, like).borrow(method)
        return method.readers[layer_idx]

    @property
    def methods(self) -> list[Method]:
        """The methods of all layers that have attended over this KV."""
        method = self.method
        return [] if method is None else [method, *method.readers.values()]

    @keeps_tensors
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> KV:
        """Store new tokens, (batch, kv_heads, tokens, head_dim) each, where head_dim may differ.

        Returns the same two tensors inside a patched forward pass, all keys and values anywhere else.
        """
        step = active_step()
        inside = step is not None and step.cache.guard is self.guard
        self.guard.check() if inside else self.guard.between_passes("update()")
        if key_states.shape[:3] != value_states.shape[:3] or key_states.dim() != 4:
            refuse_unlike(key_states, value_states, self.layer_idx)
        layout, method = layout_of(key_states, value_states, self.latent), self.method
        plain = layout is PLAIN
        keys, values = (key_states, value_states) if plain else layout.stored(key_states, value_states)
        if method is None:
            method = self._begin(keys, layout)
        else:
            same = layout is self.layout or layout == self.layout
            refuse_other_sizes(method.kv.batch, self.sizes, keys, self.layer_idx, same)
        if inside:
            self.incoming = dict.fromkeys((self.layer_idx, *self.readers), Incoming(key_states, keys, values))
            method.append(keys, values, step)
            return key_states, value_states
        return self._update_outside(method, keys, values)

    def _update_outside(self, method: Method, keys: torch.Tensor, values: torch.Tensor) -> KV:
        if self.awaited is not None:
            self.awaited.filled_outside()
        was_empty = method.length == 0
        # Other layers may have these tokens already, so that a rollback of this layer would not be enough.
        with self.guard.changing("update()"):
            method.append(keys.detach(), values.detach())
            method.flush()
            return self.layout.given(*((keys, values) if was_empty else method.read_all()))

    def mark(self) -> Any:
        """The present state, for ``rollback``; None without tokens."""
        method = self.method
        return None if method is None or not method.kv.length else method.mark()

    def rollback(self, mark: Any) -> None:
        """Restore the state at ``mark``, wherever a pass was interrupted."""
        self.incoming = {}
        if mark is None or self.method is None:
            self.reset()
        else:
            self.method.rollback(mark)

    @keeps_tensors
    def read(self) -> KV | tuple[None, None]:
        self.guard.ready()
        if self.method is None:
            return None, None
        keys, values = self.layout.given(*self.method.read_all())
        return keys.contiguous(), values.contiguous()

    def get_seq_length(self) -> int:
        """Tokens per row, in all tiers together."""
        method = self.method
        return method.length if method else 0

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Length and offset of the keys that a mask must cover; ``query_length`` may be a tensor of positions."""
        queries = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + queries, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    @keeps_tensors
    def crop(self, length: int | torch.Tensor) -> None:
        """``length`` <= 0 removes that many tokens; a positive one is the length to keep (transformers < 5.14).

        Prompt lookup of some versions (5.17) hands over a tensor of one number.
        """
        self.guard.refuse_in_pass("crop()")
        if self.method:
            held, length = self.method.length, int(length)
            keep = max(0, held + length) if length <= 0 else min(length, held)
            if keep < held:
                self.method.crop(keep)

    @keeps_tensors
    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace row ``i`` by row ``beam_idx[i]``."""
        self.guard.refuse_in_pass("reorder_cache()")
        if self.method and not _is_identity(beam_idx, self.method.batch):
            self._select_rows(self.method, beam_idx)

    @keeps_tensors
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self.guard.refuse_in_pass("batch_repeat_interleave()")
        if self.method:
            rows = torch.arange(self.method.batch, dtype=torch.int64, device="cpu")
            self._select_rows(self.method, rows.repeat_interleave(repeats))

    @keeps_tensors
    def batch_select_indices(self, indices: torch.Tensor | Sequence[int]) -> None:
        """Keep the rows ``indices``: row numbers, or a bool per row."""
        self.guard.refuse_in_pass("batch_select_indices()")
        if self.method:
            indices = torch.as_tensor(indices, device="cpu")
            rows = indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices
            self._select_rows(self.method, rows)

    def _select_rows(self, method: Method, rows: torch.Tensor) -> None:
        method.select_rows(rows)

    def reset(self) -> None:
        """Remove all tokens."""
        self.guard.refuse_in_pass("reset()")
        if self.method:
            self.method.drain()
        self.method, self.incoming = None, {}

    def offload(self) -> None:
        """Nothing to do: the method decides where KV lives."""

    prefetch = offload

    @keeps_tensors
    def __deepcopy__(self, memo: dict[int, Any]) -> ScoutLayer:
        self.guard.refuse_in_pass("copying a layer")
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        method = self.method
        own = method and method.fork()
        if method is not None and own is not None:
            own.lend_as(method)
        twin.__dict__.update(self.__dict__, guard=copy.deepcopy(self.guard, memo), incoming={}, method=own)
        return twin

    def empty_twin(self, config: ScoutConfig) -> ScoutLayer:
        """A layer without tokens for the same keys and values, with other settings."""
        return ScoutLayer(config, self.layer_idx)

    def take(
        self, chunks: Iterable[KV], layout: Layout, known: Sequence[Method] = (), rows: Sequence[int] = ()
    ) -> None:
        """Fill a layer without tokens with keys and values of others, chunk by chunk, outside of a pass.

        Parameters
        ----------
        chunks : iterable of (Tensor, Tensor)
            Keys and values as they are stored, (batch, kv_heads, tokens, head_dim) each.
        layout : Layout
            Of the layer that they come from.
        known : sequence of Method
            What kept each row before, if that is known: see :meth:`Method.learn_from`.
        rows : sequence of int
            Which row of each that was; its only one by default.
        """
        for keys, values in chunks:
            method = self.method
            if method is None:
                method = self._begin(keys, layout)
                if known:
                    method.learn_from(known, rows or [0] * len(known))
            method.append(keys, values)
            method.flush()

    def state_dict(self) -> State | None:
        """What this layer holds, as views that are valid until the next change; None without tokens."""
        method = self.method
        if method is None or not method.length:
            return None
        heads, dim = self.sizes
        own = {"layout": self.layout.as_json(), "dtype": self.dtype, "method": method.state_dict()}
        return {"batch": method.batch, "heads": heads, "dim": dim} | own

    def load_states(self, state: State, device: torch.device) -> None:
        """Take what :meth:`state_dict` gave beside keys and values: nothing."""

    def load_state_dict(self, state: State | None, device: torch.device) -> None:
        """Take what :meth:`state_dict` gave into a layer without tokens; SessionError if it does not fit."""
        if state is None:
            return
        sizes = count_in(state, "batch", 1 << 24), count_in(state, "heads", 1 << 16), 0, count_in(state, "dim", 1 << 16)
        dtype = state.get("dtype")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or not min(sizes[0], sizes[1], sizes[3]):
            raise SessionError(f"layer {self.layer_idx} holds {sizes[1]} KV heads of {sizes[3]} channels in {dtype}")
        layout = layout_from(state.get("layout"), sizes[3])
        like = torch.empty(sizes, dtype=dtype, device=device)
        method = self._make(like)
        method.load_state_dict(state_in(state, "method"))
        self.dtype, self.device, self.sizes = dtype, device, (sizes[1], sizes[3])
        self.layout, self.method = layout, method


def _is_identity(rows: torch.Tensor, batch: int) -> bool:
    same = rows.device.type == "cpu" and len(rows) == batch
    return same and bool((rows == torch.arange(batch, dtype=torch.int64, device="cpu")).all())
