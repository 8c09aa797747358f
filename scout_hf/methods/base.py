"""The interface of a method, and the registry of methods by name.

One object serves one layer of one cache. It owns its stores; everything else comes with the ``step`` argument.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from scout_hf.config import ScoutConfig
from scout_hf.errors import ConfigError, SavingError, SessionError
from scout_hf.fusion import Partial, fuse
from scout_hf.methods.lending import Lending
from scout_hf.methods.replays import Replays
from scout_hf.methods.several_tokens import attend_new, attend_over_pages, attend_past, pages_of_all
from scout_hf.registry import Registry
from scout_hf.step import Step
from scout_hf.stores import KVStore, PagePool
from scout_hf.stores.state import State, maybe_number_in, state_in

if TYPE_CHECKING:
    from typing_extensions import Self

    from scout_hf.kernels.cpu.protocols import PagedStore

PAST_CHUNK_TOKENS = 4096


class Scoring(NamedTuple):
    """How a layer computes logits from q.k: scale, and soft cap or None."""

    scale: float
    softcap: float | None


class Method(Replays, Lending, ABC):
    """What one layer stores and how it attends. To add a method: subclass, set ``name``, register.

    Parameters
    ----------
    config : ScoutConfig
    layer_idx : int
    keys : Tensor (batch, kv_heads, tokens, head_dim)
        The layer's first keys, for sizes, dtype and device. Not stored.

    Attributes
    ----------
    kv : KVStore
        The layer's KV, such as a ``PagedKV`` or ``TwoTierKV``; set it in ``__init__``.
    scoring : Scoring
        Scale and soft cap, taken from the layer's first attention call; the scale is NaN before.
    query_shape : tuple of int or None
        Query heads and head_dim, taken from the same call; None before.

    Notes
    -----
    A ``step`` offers: ``mask`` (None if there is no padding) and ``padding(device)``, the padding mask (batch, tokens)
    of bool; ``context()``, the mean number of real tokens; ``backend``, which attends host blocks; ``counters`` for
    ``stats()``: ``attended(layer, context, tokens)`` in every decode step, ``recalled(layer, blocks, nbytes)``,
    ``timed(layer, "join")`` around waiting, ``note(about, text)``.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.kernels import attend
    >>> from scout_hf.methods import Method
    >>> from scout_hf.stores import PagedKV
    >>> class Plain(Method):
    ...     name = "plain"
    ...
    ...     def __init__(self, config, layer_idx, keys):
    ...         super().__init__(config, layer_idx, keys)
    ...         batch, heads, _, dim = keys.shape
    ...         self.kv = PagedKV(batch, heads, dim, config.block_size, keys.dtype, keys.device)
    ...
    ...     def attend(self, step, query):
    ...         return attend(query, *self.read_all(), *self.scoring)
    ...
    ...     def tier_bytes(self):
    ...         return {"device": self.kv.used_bytes}
    """

    name: str = ""
    kv: KVStore
    options: ClassVar[dict[str, Any]] = {}
    """Allowed keys of ``ScoutConfig(method_options=...)``, with defaults."""
    uses: ClassVar[frozenset[str] | None] = None
    """Fields of ``ScoutConfig`` that have an effect, beside the method's name and options. None: not declared."""
    can_draft = False
    """Whether steps of ``Role.DRAFT`` are sparse and passes of several tokens exact, so that they can check drafts."""
    uses_in_drafts: ClassVar[frozenset[str]] = frozenset()
    """Fields of ``ScoutConfig`` that have an effect on drafts alone."""
    needs_query = True
    """Whether ``ahead`` gets a predicted query; if not, it is also called for the first layer, with None."""
    blockwise = False
    """Whether all that a layer holds of a token lies in its block's page and code: texts can be cut between blocks."""
    takes_inputs = False
    """Whether ``step.inputs`` must hold the hidden states that enter a layer."""
    follows_choice = False
    """Whether a layer attends to what its model chose, ``step.choice``."""

    def __init__(self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor):
        self.config, self.layer_idx = config, layer_idx
        self.settings = self.options | (config.method_options or {})
        self.kv_heads, self.dtype = keys.shape[1], keys.dtype
        self.scoring = Scoring(math.nan, None)
        self.query_shape: tuple[int, int] | None = None
        self.readers: dict[int, Any] = {}

    @classmethod
    def create(cls, config: ScoutConfig, layer_idx: int, keys: torch.Tensor) -> Method:
        """Create the object for one layer; override to choose between variants, such as by device."""
        return cls(config, layer_idx, keys)

    @classmethod
    def check(cls, config: ScoutConfig) -> None:
        """Raise ConfigError for settings that this method does not support; extend it for further checks."""
        if unknown := sorted(set(config.method_options or ()) - set(cls.options)):
            known = ", ".join(f"{name} (default {value!r})" for name, value in cls.options.items()) or "none"
            raise ConfigError(
                f"method {cls.name!r} has no option {', '.join(unknown)}; its method_options are: {known}"
            )

    @classmethod
    def used_settings(cls, config: ScoutConfig, device: torch.device) -> frozenset[str] | None:
        """Fields of ``config`` that have an effect for a model on that device; ``patch()`` warns about the others.

        Override it where this depends on the settings or the device.
        """
        return cls.uses

    @classmethod
    def is_exact(cls, config: ScoutConfig, device: torch.device) -> bool:
        """Whether every decode step is exact (all tokens, real query), for a model on that device."""
        return False

    @classmethod
    def may_attend_all(cls, config: ScoutConfig, device: torch.device) -> bool:
        """Whether ``attend`` obeys ``step.attends_all``, and can tell in time how long it took."""
        return False

    @classmethod
    def over_heads(cls, config: ScoutConfig) -> str | None:
        """What all KV heads of a layer decide together, and what to try; None if no token depends on other heads."""
        return None

    # -- hooks, in the order of a decode step -------------------------------------------------------------------

    def ahead(self, step: Step, query: torch.Tensor | None) -> None:
        """Called during the previous layer, with this layer's predicted query (batch, query_heads, 1, head_dim).

        Start here what can overlap with that layer. If ``needs_query`` is False, ``query`` is None, and the first layer
        is called during the last layer of the previous step.
        """

    @property
    def wants_ahead(self) -> bool:
        """Whether ``ahead`` should be called now."""
        return False

    def observe(self, step: Step, query: torch.Tensor) -> None:
        """Called after ``append`` of several tokens: their queries, (batch, query_heads, tokens, head_dim)."""

    @abstractmethod
    def attend(self, step: Step, query: torch.Tensor) -> Partial:
        """Attention of a decode step, after ``append``.

        Parameters
        ----------
        step : Step
        query : Tensor (batch, query_heads, 1, head_dim)
            The real query.

        Returns
        -------
        Partial
            Output and natural LSE.
        """

    def settle(self, step: Step) -> None:
        """Called after this layer's attention; the only hook that may move KV between tiers."""

    def end_step(self) -> None:
        """Called after the forward pass: drop work that ``ahead`` started and no attention used."""

    def flush(self) -> None:
        """Called after tokens were appended outside a forward pass: write back, update digests."""

    def prefilled(self, step: Step, query: torch.Tensor) -> None:
        """Called after ``settle`` of a prompt or a chunk of it; ``query`` is that of its last token."""

    # -- shared by all methods ----------------------------------------------------------------------------------

    def attend_many(self, step: Step, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Partial:
        """Exact attention of several new tokens over the cache and each other (chunked prefill, next turns, drafts).

        Parameters
        ----------
        step : Step
            With ``step.allowed`` as the mask; causal if that is None.
        query : Tensor (batch, query_heads, queries, head_dim)
        keys, values : Tensor (batch, kv_heads, queries, head_dim)
            Of the new tokens, already appended.

        Returns
        -------
        Partial
        """
        past, pages = self.kv.length - query.shape[2], pages_of_all(self, step, query)
        if pages is not None:
            result = attend_over_pages(self, step, query, keys, values, pages)
        else:
            result = fuse(attend_past(self, step, query, past) + [attend_new(self, step, query, keys, values, past)])
        step.counters.exact(self.layer_idx, self.kv.length)
        return result

    def past_pages(self, step: Step) -> PagedStore | None:
        """A store in host memory that holds the first tokens, for the CPU to attend in place.

        None: they are attended as ``past_chunks`` yields them.
        """
        return None

    def past_chunks(self, step: Step, past: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield the first ``past`` tokens in chunks: position, keys, values, (batch, kv_heads, tokens, head_dim) each.

        A chunk is valid until the next one is requested.
        """
        for start in range(0, past, PAST_CHUNK_TOKENS):
            yield start, *self.kv.read(start, min(start + PAST_CHUNK_TOKENS, past))

    def append(self, keys: torch.Tensor, values: torch.Tensor, step: Step | None = None) -> None:
        """Append new tokens, (batch, kv_heads, tokens, head_dim) each; ``step`` is None outside a forward pass."""
        # Under autocast the dtypes of keys and values differ, also from pass to pass.
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
        if self.stored_by is None:
            self.kv.crop(length)
        for reader in self.readers.values():
            reader.crop(length)

    def mark(self) -> Any:
        """The current state for ``rollback``, by reference."""
        return self.length

    def rollback(self, mark: Any) -> None:
        """Restore the state of ``mark`` after a failed pass.

        The pass may have been interrupted at any line of ``append``, ``ahead``, ``attend``, ``observe``, ``settle`` and
        ``prefilled``. Data derived from KV must be valid afterwards, or be computed again when it is next needed.
        """
        self.drain()
        if self.length > mark:
            self.crop(mark)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``."""
        self.drain()
        if self.stored_by is None:
            self.kv.select_rows(rows)
        for reader in self.readers.values():
            reader.select_rows(rows)

    def fork(self) -> Self:
        """An independent copy without its readers; shares pages, copy on write."""
        self.drain()
        twin = object.__new__(type(self))
        kv = self.kv.fork() if self.stored_by is None else self.kv
        twin.__dict__.update(self.__dict__, kv=kv, readers={})
        return twin

    def state_dict(self) -> State:
        """What this layer holds between two passes, as views that are valid until the next change.

        A method that holds more than its ``kv`` extends it, and ``load_state_dict``; SavingError if it does not.
        """
        self.drain()
        if _definer(self, "fork") < _definer(self, "state_dict"):
            raise SavingError(
                f"method {self.name!r} cannot be saved: define state_dict() and load_state_dict() beside fork()"
            )
        scale, softcap = self.scoring
        return {
            "kv": self.kv.state_dict(),
            "scale": None if math.isnan(scale) else scale,
            "softcap": softcap,
            "query_shape": None if self.query_shape is None else list(self.query_shape),
        }

    def load_state_dict(self, state: State) -> None:
        """Take what ``state_dict`` of the same method and settings gave, into a new object without tokens.

        SessionError if it does not fit; the object is of no use then.
        """
        scale, shape = maybe_number_in(state, "scale"), state.get("query_shape")
        if shape is not None and (
            not isinstance(shape, list)
            or [type(size) for size in shape] != [int, int]
            or min(shape) < 1
            or shape[0] % self.kv_heads
        ):
            raise SessionError(f"queries of heads and channels {shape!r} do not fit {self.kv_heads} KV heads")
        self.scoring = Scoring(math.nan if scale is None else scale, maybe_number_in(state, "softcap"))
        self.kv.load_state_dict(state_in(state, "kv"))
        self.query_shape = None if shape is None else (shape[0], shape[1])

    def learn_from(self, others: Sequence[Method], rows: Sequence[int]) -> None:
        """Called before rows that others kept, row ``i`` as row ``rows[i]`` of ``others[i]``, are appended here."""
        self.scoring, self.query_shape = others[0].scoring, others[0].query_shape

    def drain(self) -> None:
        """Wait for all work in flight, also of readers, and drop its results."""
        for reader in self.readers.values():
            reader.drain()

    def pools(self) -> Sequence[PagePool]:
        """The pools of the KV in host memory."""
        return ()

    @property
    def variant(self) -> str:
        """The variant that runs, for reports."""
        return type(self).__name__

    @abstractmethod
    def tier_bytes(self) -> dict[str, int]:
        """Bytes of KV per tier, and of digests: keys ``host``, ``device``, ``digests``."""


def _definer(method: Method, name: str) -> int:
    """How far up its classes that function is defined."""
    return next(place for place, kind in enumerate(type(method).__mro__) if name in vars(kind))


_METHODS: Registry[Method] = Registry("method")


def register_method(method: type[Method]) -> type[Method]:
    """Register a method for ``ScoutConfig(method=name)``; usable as a class decorator.

    Parameters
    ----------
    method : type of Method

    Returns
    -------
    type of Method
        The same class.

    Raises
    ------
    ConfigError
        If its ``name`` is empty or taken, or it is not a complete subclass of :class:`Method`.

    Examples
    --------
    >>> from scout_hf.methods import Dense, method_names, register_method
    >>> @register_method
    ... class MyDense(Dense):
    ...     name = "my-dense"
    >>> "my-dense" in method_names()
    True
    """
    return _METHODS.register(method, Method)


def method_names() -> tuple[str, ...]:
    """Allowed values of ``ScoutConfig(method=...)``.

    Examples
    --------
    >>> from scout_hf.methods import method_names
    >>> "scout" in method_names()
    True
    """
    return _METHODS.names()


def find_method(name: str) -> type[Method]:
    """The method class of that name; ConfigError with the known names if there is none."""
    return _METHODS.find(name)


def make_method(config: ScoutConfig, layer_idx: int, keys: torch.Tensor) -> Method:
    """Create the configured method for one layer.

    Parameters
    ----------
    config : ScoutConfig
    layer_idx : int
    keys : Tensor (batch, kv_heads, tokens, head_dim)
        The layer's first keys, for sizes, dtype and device. Not stored.

    Returns
    -------
    Method

    Raises
    ------
    ConfigError
        If the method is unknown or has set no ``kv``.

    Examples
    --------
    >>> import torch
    >>> from scout_hf import ScoutConfig
    >>> from scout_hf.methods import make_method
    >>> method = make_method(ScoutConfig(method="dense"), 0, torch.zeros(1, 2, 4, 64))
    >>> method.append(torch.ones(1, 2, 5, 64), torch.ones(1, 2, 5, 64))
    >>> method.length
    5
    """
    made = find_method(config.method).create(config, layer_idx, keys)
    if getattr(made, "kv", None) is None:
        raise ConfigError(f"method {made.name!r} has not set self.kv in __init__; set it to a store, such as PagedKV")
    return made
