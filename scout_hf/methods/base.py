"""The four join points that a method fills in, and the methods known by name.

One object serves one layer of one cache. It owns its stores; everything else is handed to it with the step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from scout_hf.config import ScoutConfig
from scout_hf.errors import ConfigError
from scout_hf.fusion import Partial, empty_like, fuse
from scout_hf.kernels.attend import attend
from scout_hf.registry import Registry
from scout_hf.step import Step
from scout_hf.stores import KVStore

if TYPE_CHECKING:
    from typing_extensions import Self

PAST_CHUNK_TOKENS = 4096


class Scoring(NamedTuple):
    """How a layer turns q.k into a score: factor, and soft cap or None."""

    scale: float
    softcap: float | None


class Method(ABC):
    """What one layer keeps and how it attends; subclass, set ``name``, register.

    Parameters
    ----------
    config : ScoutConfig
    layer_idx : int
    keys : Tensor (batch, kv_heads, tokens, head_dim)
        The first keys that the layer gets: sizes, dtype and device. Not stored.

    Attributes
    ----------
    kv : PagedKV or TwoTierKV
        Where the layer's KV is; anything with ``append, read, crop, select_rows, fork, length``.
    scoring : Scoring
        Learnt from the layer's own attention call; not a number until the first one.
    query_shape : tuple of int or None
        Query heads and head dimension, learnt there as well; None until then.

    Notes
    -----
    What a method finds in a ``step``: ``mask``, None where no token is padding, else ``padding(device)`` says which
    tokens are real, (batch, tokens) of bool; ``context()``, the mean of real tokens; ``backend``, which attends to host
    blocks; ``counters``, for ``stats()``: ``attended(layer, context, tokens)`` in every decode step,
    ``recalled(layer, blocks, nbytes)``, ``timed(layer, "join")`` around waiting, ``note(about, text)``.
    """

    name: str = ""
    kv: KVStore
    options: ClassVar[dict[str, Any]] = {}
    """What ``ScoutConfig(method_options=...)`` may set, with defaults."""
    needs_query = True
    """Whether ``ahead`` is handed a predicted query; one that needs none is called for the first layer as well."""
    takes_inputs = False
    """Whether ``step.inputs`` shall hold the hidden states that enter a layer."""

    def __init__(self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor):
        self.config, self.layer_idx = config, layer_idx
        self.settings = self.options | (config.method_options or {})
        self.kv_heads, self.dtype = keys.shape[1], keys.dtype
        self.scoring = Scoring(math.nan, None)
        self.query_shape: tuple[int, int] | None = None

    @classmethod
    def create(cls, config: ScoutConfig, layer_idx: int, keys: torch.Tensor) -> Method:
        """The object for one layer; override to choose between variants by device."""
        return cls(config, layer_idx, keys)

    @classmethod
    def check(cls, config: ScoutConfig) -> None:
        """Raise ConfigError for settings that this method cannot serve; extend for more."""
        if unknown := sorted(set(config.method_options or ()) - set(cls.options)):
            known = ", ".join(f"{name} (default {value!r})" for name, value in cls.options.items()) or "none"
            raise ConfigError(
                f"method {cls.name!r} has no option {', '.join(unknown)}; its method_options are: {known}"
            )

    @classmethod
    def is_exact(cls, config: ScoutConfig, device: torch.device) -> bool:
        """Whether every decode step attends to everything with the real query, for a model on that device."""
        return False

    # -- the join points, in the order of a decode step ---------------------------------------------------------

    def ahead(self, step: Step, query: torch.Tensor | None) -> None:
        """One layer before this one: the predicted query (batch, query_heads, 1, head_dim) is known.

        A method that needs no query gets None, its first layer during the last layer of the step before.
        """

    @property
    def wants_ahead(self) -> bool:
        """Whether ``ahead`` would make use of being called now."""
        return False

    def observe(self, step: Step, query: torch.Tensor) -> None:
        """After ``append`` of several tokens and before ``settle``: queries (batch, query_heads, tokens, head_dim)."""

    @abstractmethod
    def attend(self, step: Step, query: torch.Tensor) -> Partial:
        """In a decode step, after ``append``: attention of the real query (batch, query_heads, 1, head_dim)."""

    def settle(self, step: Step) -> None:
        """After this layer's attention: the only place where KV moves between tiers."""

    def end_step(self) -> None:
        """The whole forward pass is through: drop what ``ahead`` started and no attention used."""

    def flush(self) -> None:
        """After tokens came in outside a forward pass: bring the tiers in order."""

    def prefilled(self, step: Step, query: torch.Tensor) -> None:
        """A prompt or a part of it is in, and settled; ``query`` is that of its last token."""

    # -- what all methods share ---------------------------------------------------------------------------------

    def attend_many(self, step: Step, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Partial:
        """Exact attention of several new tokens over all that is cached and over themselves, causally if not told else.

        ``query`` is (batch, query_heads, queries, head_dim); ``keys`` and ``values`` are the new tokens', already
        appended. Chunked prefill, next turns and the verification of drafted tokens come here.
        """
        queries, parts = query.shape[2], []
        past = self.kv.length - queries
        for start, old_keys, old_values in self.past_chunks(step, past):
            stop = start + old_keys.shape[2]
            allowed = None if step.mask is None else step.padding(query.device)[:, None, None, start:stop]
            allowed = allowed if step.allowed is None else step.allowed[..., start:stop]
            parts.append(attend(query, old_keys, old_values, *self.scoring, allowed))
        new = None if step.mask is None else step.padding(query.device)[:, None, None, past:]
        if step.allowed is not None:
            parts.append(attend(query, keys, values, *self.scoring, step.allowed[..., past:]))
        elif new is None or bool(new.all()):
            parts.append(attend(query, keys, values, *self.scoring, causal=True))
        else:
            order = torch.arange(queries, dtype=torch.int64, device=query.device)
            allowed = new & (order[:, None] >= order[None, :])
            parts.append(attend(query, keys, values, *self.scoring, allowed))
        step.counters.exact(self.layer_idx, self.kv.length)
        return fuse(parts) if parts else empty_like(query)

    def past_chunks(self, step: Step, past: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The first ``past`` tokens in pieces: first token, keys and values (batch, kv_heads, tokens, head_dim) each.

        A piece is valid until the next one is asked for.
        """
        for start in range(0, past, PAST_CHUNK_TOKENS):
            yield start, *self.kv.read(start, min(start + PAST_CHUNK_TOKENS, past))

    def append(self, keys: torch.Tensor, values: torch.Tensor, step: Step | None = None) -> None:
        """Store new tokens, (batch, kv_heads, tokens, head_dim) each; ``step`` is the forward pass they come in."""
        # Autocast makes keys and values of different dtypes, and not the same ones in every pass.
        if keys.dtype != self.dtype or values.dtype != self.dtype:
            keys, values = keys.to(self.dtype), values.to(self.dtype)
        self.kv.append(keys, values)

    def read_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, (batch, kv_heads, length, head_dim) each."""
        return self.kv.read(0, self.kv.length)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.kv.batch

    @property
    def length(self) -> int:
        """Tokens per row."""
        return self.kv.length

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self.drain()
        self.kv.crop(length)

    def mark(self) -> Any:
        """The present state, to go back to when a pass fails; holds no copy of keys and values."""
        return self.length

    def rollback(self, mark: Any) -> None:
        """Be what it was at the mark, wherever the pass after it was interrupted.

        Any line of ``append``, ``ahead``, ``attend``, ``observe``, ``settle`` and ``prefilled`` may be the last one
        that ran: what is made from keys and values is either right after this, or made again when it is next needed.
        """
        self.drain()
        if self.length > mark:
            self.crop(mark)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row ``i`` what row ``rows[i]`` was."""
        self.drain()
        self.kv.select_rows(rows)

    def fork(self) -> Self:
        """A twin that shares what can be shared and is independent in every other way."""
        self.drain()
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, kv=self.kv.fork())
        return twin

    def drain(self) -> None:
        """Wait for work in flight and drop its results."""

    def slabs(self) -> Sequence[torch.Tensor]:
        """The memory that KV in host memory lies in."""
        return ()

    @property
    def variant(self) -> str:
        """What really runs, for reports."""
        return type(self).__name__

    # -- decode steps that are captured once and replayed, see scout_hf.graph -------------------------------------
    #
    # A method that has a key finds ``step.clock`` in the pass that is captured, and keeps ``kv`` as a ``TwoTierKV``.

    def capture_key(self, step: Step) -> Any:
        """What a captured step of this layer takes for given, and is void without; None if it cannot be captured."""
        return None

    def before_replay(self, step: Step, padding_mask: torch.Tensor | None) -> float:
        """On the host, before a captured step runs, also in the pass that captures it: let it find what it waits for.

        ``padding_mask`` is (batch, capacity) of bool on the CPU. Returns this layer's entry of ``step.clock.shares``.
        """
        raise NotImplementedError(f"method {self.name!r} has a capture_key and no before_replay")

    def after_replay(self, step: Step) -> None:
        """On the host, behind a captured step that is on its way: count what it did, move full blocks."""

    def abort_replay(self) -> None:
        """The step that ``before_replay`` was called for will not run."""

    @abstractmethod
    def tier_bytes(self) -> dict[str, int]:
        """Bytes held, by what holds them: ``host``, ``device``, ``digests``."""


_METHODS: Registry[Method] = Registry("method")


def register_method(method: type[Method]) -> type[Method]:
    """Make a method available as ``ScoutConfig(method=name)``; usable as a class decorator."""
    return _METHODS.register(method, Method)


def method_names() -> tuple[str, ...]:
    """Names that ``ScoutConfig(method=...)`` takes."""
    return _METHODS.names()


def find_method(name: str) -> type[Method]:
    """The method of that name, or ConfigError with the names there are."""
    return _METHODS.find(name)


def _complete(made: Method) -> Method:
    if getattr(made, "kv", None) is None:
        raise ConfigError(f"method {made.name!r} has no self.kv after __init__; set a store, such as stores.PagedKV")
    return made


def make_method(config: ScoutConfig, layer_idx: int, keys: torch.Tensor) -> Method:
    """The configured method for one layer, sized by its first keys (batch, kv_heads, tokens, head_dim)."""
    return _complete(find_method(config.method).create(config, layer_idx, keys))
