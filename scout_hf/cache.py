"""``ScoutCache``: a transformers Cache whose full-attention layers are kept by a method."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from scout_hf.auto_budget import AutoBudget
from scout_hf.auto_draft import AutoDraft
from scout_hf.awaited import Awaited
from scout_hf.cache_layer import ScoutLayer
from scout_hf.cache_reading import copy_as_dynamic, describe, iterate, refuse_saving
from scout_hf.cache_saving import load, save
from scout_hf.change_guard import LINEAR, ChangeGuard
from scout_hf.compat.cropping import fixed_layers, tokens_to_crop
from scout_hf.compat.indexed_layers import has_indexer
from scout_hf.compat.linear_layers import Linear, LinearAndFull, drop_states, rows_from
from scout_hf.compat.modes import keeps_tensors
from scout_hf.compat.per_layer import config_of
from scout_hf.compat.shared_kv import forget_shared, holds_nothing, storing_layers
from scout_hf.config import ScoutConfig
from scout_hf.errors import CacheStateError, ConfigError
from scout_hf.fitting import check_names, layers_of
from scout_hf.hybrid_layer import HybridLayer
from scout_hf.indexed_layer import IndexedLayer
from scout_hf.layouts import latent_widths
from scout_hf.methods import Method
from scout_hf.padding import Padding
from scout_hf.rows import REORDER, REPEAT, SELECT, rows_asked, rows_held
from scout_hf.sessions.mapped import OpenFile
from scout_hf.sizes import bytes_of
from scout_hf.step import Role
from scout_hf.stores.host_memory import HostMemory
from scout_hf.stores.late import LateShares
from scout_hf.stores.memory import huge_page_bytes
from scout_hf.stores.staging import Staging
from scout_hf.token_log import TokenLog


class ScoutCache(Cache):
    """KV cache for a patched model. The method of ``scout_config`` keeps the full-attention layers.

    Pass it as ``scout_hf.CACHE``, the argument's name in the installed transformers (``cache``, before 5.24
    ``past_key_values``). A model that is not patched attends to all of its tokens.

    Sliding-window, chunked and linear layers keep their stock cache layers. Inside the forward pass of a patched model
    ``update`` returns only the new keys and values; elsewhere it behaves as in DynamicCache. In training mode only
    first prompts have attention dropout; a warning says so once.

    Parameters
    ----------
    config : PreTrainedConfig
        ``model.config``.
    scout_config : ScoutConfig, optional
        Settings; single fields may be given by keyword instead.

    Raises
    ------
    ConfigError
        If a setting is not allowed, or a recall profile belongs to another model.

    Examples
    --------
    >>> cache = scout_hf.ScoutCache(model.config, budget=1024)
    >>> tokens = model.generate(**inputs, **{scout_hf.CACHE: cache}, max_new_tokens=8)
    """

    def __init__(self, config: Any, scout_config: ScoutConfig | None = None, **options: Any):
        self.scout_config = ScoutConfig.from_options(scout_config, **options)
        if not hasattr(config, "get_text_config"):
            raise ConfigError(
                f"ScoutCache got a config of type {type(config).__name__}; pass model.config first, settings second"
            )
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(
                f"{type(config).__name__} is of an encoder-decoder model; ScoutCache takes decoder-only models"
            )
        text = config.get_text_config(decoder=True)
        layers = DynamicCache(config=text).layers
        self.guard = ChangeGuard()
        limit = self.scout_config.host_memory
        memory = None if limit is None else HostMemory(bytes_of(limit), self.scout_config.spill_dir)
        # Number of layers by the config: layers that share the KV of another have no cache layer.
        self.depth = layers_of(text, len(layers))
        check_names(self.scout_config, text, self.depth or len(layers))
        # For layers without a place of their own here: the layer whose KV they attend over.
        self.stored_by = storing_layers(text)
        for index, layer in enumerate(layers):
            # By exact type: sliding and quantized layers are subclasses that stay as they are.
            if type(layer) is DynamicLayer:
                readers = tuple(reader for reader, stored in self.stored_by.items() if stored == index)
                latent = latent_widths(config_of(text, index))
                layers[index] = ScoutLayer(self.scout_config, index, self.guard, memory, latent, readers)
            elif type(layer) is LinearAndFull:
                states = getattr(layer, "number_of_states", 1)
                layers[index] = HybridLayer(states, self.scout_config, index, self.guard, memory)
            elif has_indexer(layer):
                own = self.scout_config, index, self.guard, memory, latent_widths(config_of(text, index))
                layers[index] = IndexedLayer(type(layer), text, *own)
        super().__init__(layers=layers)
        # Whether layers are asked what they chose themselves, in place of a mask that hides the rest.
        self.asks_for_choice = any(isinstance(layer, IndexedLayer) for layer in layers)
        self.has_states = any(isinstance(layer, Linear) for layer in layers)
        # A weak reference to the AliveCaches that count it.
        self.seen_by: Any = None
        self.awaited: Awaited | None = None
        # A weak reference to the model whose passes filled it.
        self.filled_by: Any = None
        # Files that hold pages of it.
        self.files: tuple[OpenFile, ...] = ()
        self.padding, self.staging, self.log = Padding(), Staging(), TokenLog()
        self.late = LateShares()
        self.auto, self.auto_draft = AutoBudget(), AutoDraft()
        # What its next passes are for.
        self.role = Role.ORDINARY
        if not self.scout_layers:
            warnings.warn(
                f"every layer of this {text.model_type} model has a sliding window or no attention at all: there is "
                "nothing for scout_hf to do; the cache behaves like DynamicCache",
                stacklevel=2,
            )

    @property
    def scout_layers(self) -> list[ScoutLayer]:
        """The layers that a method keeps."""
        return [layer for layer in self.layers if isinstance(layer, ScoutLayer)]

    def layer_of(self, layer_idx: int) -> ScoutLayer | None:
        """The layer that keeps what this layer of the model attends over; None if no method keeps it."""
        place = self.stored_by.get(layer_idx, layer_idx)
        layer = self.layers[place] if place < len(self.layers) else None
        return layer if isinstance(layer, ScoutLayer) else None

    @property
    def methods(self) -> list[Method]:
        """The methods of all layers that attend, as far as they hold tokens."""
        return [method for layer in self.scout_layers for method in layer.methods]

    @property
    def has_stock_layers(self) -> bool:
        """Whether a layer left to transformers holds anything."""
        return any(not isinstance(layer, ScoutLayer) and not holds_nothing(layer) for layer in self.layers)

    @property
    def is_initialized(self) -> bool:
        """Whether it holds tokens. Models that take images read this to detect the first pass."""
        layers = self.scout_layers
        return any(layer.is_initialized for layer in layers) if layers else super().is_initialized

    @property
    def token_ids(self) -> torch.Tensor | None:
        """The ids of the tokens that it holds, padding included, (batch, tokens) of int64 on the CPU.

        None where they are not known: after embeddings, images, positions of the caller's own, or ``update()``.

        Examples
        --------
        >>> cache = handle.new_cache()
        >>> tokens = model.generate(**inputs, **{scout_hf.CACHE: cache}, max_new_tokens=8)
        >>> bool((cache.token_ids == tokens[:, :-1]).all())
        True
        """
        held = self.log.held(self.get_seq_length(), self.guard.changes)
        return None if held is None else held.ids

    @property
    def has_stock_full_layers(self) -> bool:
        """Whether a layer may need a full mask: one of full attention left to transformers, or any where none is kept.

        Moshi hands its sliding layers the mask of full attention, and indexers read it.
        """
        others = [
            layer for layer in self.layers if not isinstance(layer, ScoutLayer) or isinstance(layer, IndexedLayer)
        ]
        return len(others) == len(self.layers) or any(
            isinstance(layer, CacheLayerMixin) and not getattr(layer, "is_sliding", False) for layer in others
        )

    def keep_windows_whole(self) -> None:
        """Let sliding-window layers keep all tokens, so that drafts can be cropped; stock generate() does the same."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, DynamicSlidingWindowLayer):
                self.layers[index] = DynamicLayer()

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Layer by layer what DynamicCache gives: keys, values, and a sliding window or None.

        ``DynamicCache(cache)`` takes its data from here.
        """
        self.guard.ready()
        return iterate(self)

    @keeps_tensors
    def to_dynamic(self) -> DynamicCache:
        """A DynamicCache of the same tokens: for a model that is not patched, to change tensors, or to save them.

        Returns
        -------
        DynamicCache
            Copies of keys and values, on the device of their layer; with ``host_dtype="int8"`` the rounded ones.
            Sliding windows and linear states are copied too.

        Raises
        ------
        CacheStateError
            If a failed pass left this cache unusable.

        Notes
        -----
        Do not call it while another thread runs a pass with this cache: some layers may lack the new tokens.

        Examples
        --------
        >>> cache = handle.new_cache()
        >>> model.generate(**inputs, **{scout_hf.CACHE: cache})
        >>> stock = cache.to_dynamic()
        """
        self.guard.ready()
        return copy_as_dynamic(self)

    @keeps_tensors
    def save(self, path: str | os.PathLike[str], model: Any = None, *, token_ids: bool = True) -> None:
        """Write this cache to a folder, from which :meth:`load` opens it again; also in the middle of a conversation.

        The folder is written whole or not at all, and can be read by its owner only. It is about as large as the KV.
        With tensor parallel each rank writes its part, ``path/rank-0-of-2``: call it on all of them.

        Parameters
        ----------
        path : path-like
            A name that is free, or a session, which is replaced.
        model : PreTrainedModel, optional
            Whose keys and values these are; by default the patched model that filled the cache.
        token_ids : bool
            Whether to save the token ids too, as far as they are known (:attr:`token_ids`). Without them the text
            cannot be read out of the session, and ``generate()`` needs the ids from you.

        Raises
        ------
        SavingError
            If there are no tokens, the model is not known, the method or digest cannot be saved, or ``path`` is not
            free.
        CacheStateError
            During a forward pass, or if a failed pass left this cache unusable.
        OSError
            If the disk is full or the folder cannot be written to.

        Examples
        --------
        >>> cache = handle.new_cache()
        >>> tokens = model.generate(**inputs, **{scout_hf.CACHE: cache}, max_new_tokens=8)
        >>> cache.save("contract.kv")
        """
        self.guard.between_passes("save()")
        begun = self.guard.changes

        def unchanged() -> None:
            self.guard.refuse_in_pass("save()")
            if self.guard.changes != begun:
                raise CacheStateError(
                    "this cache was changed by another thread while it was being saved, and nothing was written; "
                    "save it between passes, or save a fork"
                )

        save(self, path, model, token_ids, unchanged)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any, **options: Any) -> ScoutCache:
        """Open a saved cache: its pages are mapped from the file and read as they are wanted.

        A block is checked when it is first read: a damaged one is an error, not wrong text. New tokens go to memory;
        the file is not changed.

        Parameters
        ----------
        path : path-like
        model : PreTrainedModel
            The model that it was made with, patched or not.
        **options
            Fields of ``ScoutConfig`` that replace those that it was saved with. If the method, ``block_size``,
            ``window``, ``host_dtype`` or ``split`` differs, keys and values are copied into memory.

        Returns
        -------
        ScoutCache

        Raises
        ------
        SessionError
            If there is no session, it is damaged, of another model or other weights, or of a newer format.
        ConfigError
            If a setting is not allowed.

        Examples
        --------
        >>> cache = scout_hf.ScoutCache.load("contract.kv", model)
        >>> cache.get_seq_length() > 0
        True
        """
        return load(cls, path, model, options)

    def __repr__(self) -> str:
        return describe(self, self.scout_layers, self.scout_config.in_brief, self.tier_bytes())

    def tier_bytes(self) -> dict[str, int]:
        """Bytes held by tier: ``host``, ``device``, ``digests``, and ``stock`` for layers left to transformers."""
        total: dict[str, int] = {}
        held = [method.tier_bytes() for method in self.methods]
        for layer in self.layers:
            names = ("index_keys",) if isinstance(layer, ScoutLayer) else ("keys", "values")
            tensors = [tensor for name in names if (tensor := getattr(layer, name, None)) is not None]
            if tensors or not isinstance(layer, ScoutLayer):
                held.append({"stock": sum(t.numel() * t.element_size() for t in tensors)})
        for tier, amount in (item for one in held for item in one.items()):
            total[tier] = total.get(tier, 0) + amount
        if staged := self.staging.used_bytes:
            total["device"] = total.get("device", 0) + staged
        return total

    def huge_page_bytes(self) -> int:
        """Bytes of KV in host memory that lie on huge pages. Takes milliseconds."""
        methods = [layer.method for layer in self.scout_layers if layer.method]
        return huge_page_bytes([slab for method in methods for pool in method.pools() for slab in pool.slabs])

    def fork(self) -> ScoutCache:
        """A copy that continues independently; both share pages until one writes to them. Same as ``copy.deepcopy``."""
        return copy.deepcopy(self)

    def reset(self) -> None:
        """Remove all tokens. Also makes a cache usable again after an interrupted change."""
        self.guard.empty("reset()")
        super().reset()
        drop_states(self.layers)
        self.padding.forget()
        self.staging.forget()
        self.log.forget()
        self.guard.torn = None

    def crop(self, tokens_to_remove: int | torch.Tensor) -> None:
        """Remove the last ``-tokens_to_remove`` tokens of every row, in all layers; a positive number is kept.

        CacheStateError for linear states and for sliding windows that are full, from which no tokens can be taken.
        """
        self.guard.between_passes("crop()")
        begun = self.guard.changes
        held = max((layer.get_seq_length() for layer in self.scout_layers), default=self.get_seq_length())
        removed = tokens_to_crop(int(tokens_to_remove), held)
        if (fixed := fixed_layers(self.layers)) and held and removed:
            raise CacheStateError(
                f"crop(): {fixed}, from which no tokens can be taken; nothing was changed. Keep a fork (cache.fork()) "
                "of what you may want to go back to"
            )
        if removed is not None and not fixed:
            with self.guard.changing("crop()", begun):
                super().crop(removed)
            self.log.cropped(self.get_seq_length(), self.guard.changes)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace row ``i`` by row ``beam_idx[i]``, in all layers."""
        self._change_rows(REORDER, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times, in all layers."""
        self._change_rows(REPEAT, repeats)

    def batch_select_indices(self, indices: torch.Tensor | Sequence[int]) -> None:
        """Keep the rows ``indices``, in all layers."""
        self._change_rows(SELECT, indices)

    def _change_rows(self, operation: str, given: Any) -> None:
        self.guard.between_passes(f"{operation}()")
        begun, held = self.guard.changes, rows_held(self.layers)
        rows = rows_asked(operation, given, held)
        # Linear layers of transformers can be reordered and nothing else.
        linear = self.has_states and bool(self.scout_layers)
        with self.guard.changing(f"{operation}()", begun):
            self.padding.forget()
            getattr(super(), REORDER if linear else operation)(rows_from(rows, held or 0) if linear else rows)
        self.log.selected(rows, self.guard.changes)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens per row of a layer, padding included. Rolls back a pass that was interrupted."""
        self.guard.end_interrupted_pass()
        return super().get_seq_length(layer_idx)

    __reduce_ex__ = refuse_saving

    def __copy__(self) -> ScoutCache:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    @keeps_tensors
    def __deepcopy__(self, memo: dict[int, Any]) -> ScoutCache:
        self.guard.between_passes("fork()")
        begun, twin = self.guard.changes, object.__new__(type(self))
        memo[id(self)] = twin
        memo[id(self.log)] = self.log.fork(self.guard.changes, 0)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        self.guard.refuse_unless(begun, "fork()")
        if self.seen_by is not None and (others := self.seen_by()) is not None:
            others.add(twin)
        return twin

    def drain(self) -> None:
        """Wait for background work of all layers and drop its results."""
        for layer in self.scout_layers:
            layer.incoming = {}
            if layer.method is not None:
                layer.method.drain()

    def end_step(self) -> None:
        """Called after a forward pass that succeeded: drop jobs that it started and did not use."""
        for method in self.methods:
            method.end_step()
        forget_shared(self)

    def mark(self) -> list[Any]:
        """The state of every layer, for ``rollback``. No keys or values are copied."""
        self.guard.between_passes("another forward pass")
        for file in self.files:
            file.check()
        # Stock attention layers replace their tensors at every update, so their attributes are a snapshot.
        return [layer.mark() if isinstance(layer, ScoutLayer) else dict(layer.__dict__) for layer in self.layers]

    def rollback(self, marks: list[Any]) -> None:
        """Restore the state of every layer at ``mark``, after a forward pass that failed."""
        self.guard.torn, torn = "a forward pass", None
        self.guard.leave_pass()
        self.drain()
        for device in {getattr(layer.method.kv, "device", None) for layer in self.scout_layers if layer.method}:
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)  # in-flight copies end before their pages are reused
        self.staging.forget()
        self.padding.forget()
        self.late.forget()
        for layer, mark in zip(self.layers, marks):
            if isinstance(layer, ScoutLayer):
                layer.rollback(mark)
            elif not holds_nothing(layer):
                layer.__dict__.update(mark)
            torn = LINEAR if isinstance(layer, Linear) else torn
        self.guard.torn = torn
