"""``patch(model)`` and its exact removal."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from scout_hf.cache import ScoutCache
from scout_hf.changes import Changes, call_all
from scout_hf.compat.cache_names import CACHE
from scout_hf.compat.unwrap import unwrapped
from scout_hf.config import ScoutConfig
from scout_hf.drafting import Drafting, most_drafts
from scout_hf.errors import ConfigError, PatchError
from scout_hf.fitting import check_names, check_own_names
from scout_hf.kernels.device import find_kernels
from scout_hf.methods.unused import warn_of_unused
from scout_hf.naming import AttentionNames
from scout_hf.on_decoder import changes_of_decoder
from scout_hf.on_generate import changes_of_generate, drop_ours
from scout_hf.pass_hooks import PassHooks, is_ours, is_patched
from scout_hf.patches import family_of
from scout_hf.prefix import reasons
from scout_hf.prefix.reading import Reading, read_ahead
from scout_hf.prefix.reuse import Reuse
from scout_hf.prefix.store import PrefixStore, store_of
from scout_hf.recall_intervals import RecallIntervals
from scout_hf.recall_profile import profile_recall
from scout_hf.selfcheck import check_unknown_family
from scout_hf.stats import Stats, summarise
from scout_hf.trace import Trace, record

HANDLE = "_scout_handle"
ATTENTIONS = ("auto", "sdpa")


def patch(
    model: torch.nn.Module,
    config: ScoutConfig | None = None,
    *,
    attention: str = "auto",
    store: PrefixStore | str | os.PathLike[str] | None = None,
    draft: bool | int | None = None,
    **options: Any,
) -> Handle:
    """Make ``model.generate()`` use a :class:`ScoutCache`: paged KV, and block-sparse attention in decode steps.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model; it may be wrapped by torch.compile, PEFT or DistributedDataParallel. It is changed in
        place; ``handle.remove()`` undoes that.
    config : ScoutConfig, optional
        Settings. Single fields can be given by keyword: ``patch(model, budget=2048)``.
    attention : {"auto", "sdpa"}, default "auto"
        ``auto`` accepts transformers' own attention functions, which are plain causal softmax attention, and refuses
        functions that users registered or replaced. ``sdpa`` accepts any function as plain softmax attention; if it is
        not one of transformers', prompts run through transformers' sdpa (eager for softcaps and sinks).
    store : PrefixStore, path-like or None
        A folder in which ``generate()`` keeps what prompts it read, and looks for the beginning of each new one, so
        that only the rest is read. None: nothing is kept.
    draft : bool, int or None
        True: decode exactly, and faster where that pays: sparse steps draft tokens, and one exact pass checks them. An
        int: the most tokens per check. See the guide "Lossless drafts".

    Returns
    -------
    Handle
        Statistics and removal. As a context manager it removes the patch at the end of the block.

    Raises
    ------
    ConfigError
        If a setting is not allowed.
    UnsupportedModelError
        If the model's attention is not supported.
    PatchError
        If the model is patched already.

    Notes
    -----
    After an error the model is unchanged.

    Examples
    --------
    >>> handle = scout_hf.patch(model, budget=2048)
    >>> tokens = model.generate(**inputs, max_new_tokens=64)
    >>> handle.remove()

    >>> with scout_hf.patch(model, budget=None) as handle:
    ...     tokens = model.generate(**inputs, max_new_tokens=64)
    """
    if attention not in ATTENTIONS:
        raise ConfigError(f"attention={attention!r} is not allowed: attention takes 'auto' or 'sdpa'; try 'auto'")
    check_own_names(options)
    config = ScoutConfig.from_options(config, **options)
    kept = None if store is None else store_of(store)
    model = unwrapped(model)
    family = family_of(model)
    _drop_leftovers(model)
    if HANDLE in model.__dict__ or is_patched(family.decoder(model)):
        raise PatchError(_ALREADY)
    whole: Any = model  # a PreTrainedModel, whose attributes a Module does not declare
    text = whole.config.get_text_config(decoder=True)
    check_names(config, text, len(family.layers(family.decoder(model))))
    most = most_drafts(draft, config, reasons.of_model(whole))
    find_kernels(config.gpu_kernels, whole.device)
    handle_of = functools.partial(
        Handle, config=config, family=family, any_attention=attention == "sdpa", store=kept, most_drafts=most
    )
    handle = handle_of(model)
    try:
        check_unknown_family(model, family, handle_of, handle._names.foreign)
        handle._install()
        warn_of_unused(config, whole.device, stacklevel=2, drafting=most > 0)
        return handle
    except BaseException:
        handle._uninstall()
        raise


def unpatch(model: torch.nn.Module) -> None:
    """Undo ``patch(model)``, as ``handle.remove()`` does.

    Parameters
    ----------
    model : PreTrainedModel
        A patched model, or a wrapper that ``patch`` accepts.

    Raises
    ------
    PatchError
        If the model is not patched, or one of its forward passes is running in this thread.

    Examples
    --------
    >>> handle = scout_hf.patch(model)
    >>> scout_hf.unpatch(model)
    """
    model = unwrapped(model)
    _drop_leftovers(model)
    handle = model.__dict__.get(HANDLE)
    if handle is None:
        raise PatchError("this model is not patched: there is nothing to undo")
    if handle.model is not model:
        raise PatchError("this is a shallow copy of a patched model: unpatch the model that it was copied from")
    handle.remove()


_ALREADY = (
    "this model is patched already (or another one with the same decoder); call handle.remove() of the handle that "
    f"patch() returned, or scout_hf.unpatch(model), first, or pass a ScoutCache with other settings as {CACHE}"
)


class Handle:
    """What ``patch`` returns: statistics, profiling, tracing and removal.

    A deep copy of a patched model has a handle of its own.

    Attributes
    ----------
    model : PreTrainedModel
        The patched model, without wrappers.
    config : ScoutConfig
        The settings of the patch.
    store : PrefixStore or None
        Where prompts are kept.

    Examples
    --------
    >>> with scout_hf.patch(model, budget=2048) as handle:
    ...     tokens = model.generate(**inputs, max_new_tokens=64)
    ...     print(handle.stats())
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: ScoutConfig,
        family: Any,
        any_attention: bool = False,
        store: PrefixStore | None = None,
        most_drafts: int = 0,
    ):
        self.model, self.config, self.store, self._family = model, config, store, family
        self._decoder = family.decoder(model)
        self._names = AttentionNames(self._decoder, family.layers(self._decoder), any_attention)
        self._hooks = PassHooks(model, config, family, self._names, lossless=most_drafts > 0)
        self._changes = Changes()
        counters, running = self._hooks.counters, self._hooks.running
        self._reuse = None if store is None else Reuse(store, model, counters, is_ours)
        self._drafting = Drafting(most_drafts, counters, running, self._hooks.ranks) if most_drafts else None

    # -- what a user calls --------------------------------------------------------------------------------------

    @property
    def exact(self) -> bool:
        """Whether decode steps with these settings are exact: they attend to all tokens with the real query."""
        return self._hooks.is_exact(self.config)

    def stats(self) -> Stats:
        """What was attended, where, and what it cost, since ``patch`` or ``reset_stats``.

        Returns
        -------
        Stats
            Prints as a table; ``to_dict()`` gives plain values.

        Examples
        --------
        >>> tokens = model.generate(**inputs, max_new_tokens=8)
        >>> handle.stats().steps
        7
        """
        hooks, counters = self._hooks, self._hooks.counters
        hooks.monitor.collect(wait=True)
        exact = counters.approximate_steps == 0 if counters.steps else self.exact
        return summarise(counters, self.config.method, exact, dict(hooks.kv_bytes), hooks.huge_page_bytes)

    def reset_stats(self) -> None:
        """Set all counters to 0."""
        self._hooks.monitor.forget()
        self._hooks.counters.reset()

    def new_cache(self, **options: Any) -> ScoutCache:
        """An empty cache for this model.

        Parameters
        ----------
        **options
            Fields of ``ScoutConfig`` that replace the patch's settings for this cache.

        Returns
        -------
        ScoutCache

        Raises
        ------
        ConfigError
            If a setting is not allowed.

        Examples
        --------
        >>> cache = handle.new_cache(budget=512)
        >>> tokens = model.generate(**inputs, **{scout_hf.CACHE: cache}, max_new_tokens=64)
        """
        cache = ScoutCache(self.model.config, self.config, **options)
        if options:
            model: Any = self.model  # a PreTrainedModel, whose attributes a Module does not declare
            drafting = self._drafting is not None
            warn_of_unused(cache.scout_config, model.device, stacklevel=2, among=options, drafting=drafting)
        self._hooks.counters.alive.add(cache)
        return cache

    def read(
        self,
        ids: torch.Tensor,
        tick: Callable[[int], Any] = lambda tokens: None,
        *,
        must_keep: bool = True,
        **options: Any,
    ) -> Reading:
        """Read a text ahead into the store of this patch, in chunks, from where the store knows it.

        Parameters
        ----------
        ids : Tensor (tokens,) or (1, tokens) of int64
            Without padding. ``generate()`` finds it where a prompt begins with these tokens.
        tick : callable
            Gets the number of tokens that are there: at the begin those that were found, then after each chunk.
        must_keep : bool
            Whether a store that cannot be written to is an error; else a warning.
        **options
            Fields of ``ScoutConfig`` for the cache.

        Returns
        -------
        Reading
            What was found and read, and the cache, from whose forks questions can be answered.

        Raises
        ------
        ConfigError
            If the patch has no store, or for ids that are no text.
        OSError
            If the disk is full; what was kept before is there.
        SessionError
            If what the store has is damaged; it is removed, and the next call reads that part again.
        KeyboardInterrupt
            What was read until then is kept.

        Examples
        --------
        >>> with scout_hf.patch(model, store="kv-store") as handle:
        ...     reading = handle.read(document)
        ...     tokens = model.generate(prompt, **{scout_hf.CACHE: reading.cache.fork()}, max_new_tokens=8)
        """
        if self._reuse is None:
            raise ConfigError("read() needs a store to read into; try patch(model, store='kv-store')")
        if self.model.__dict__.get(HANDLE) is not self:
            raise PatchError("this patch was removed; patch the model again to read with it")
        return read_ahead(self._reuse, self.model, self.new_cache(**options), ids, tick, must_keep)

    def profile_recall(self, prompts: Any, steps: int = 48, threshold: float | None = None) -> RecallIntervals:
        """Measure a recall interval per layer on prompts (ScoutAttention, section 3.4).

        Decodes from every prompt without recall, and finds for how many steps each layer's CPU share stays under the
        threshold. The steps count in ``stats()``.

        Parameters
        ----------
        prompts : sequence of Tensor (tokens,) or (1, tokens), or of list of int
            Token ids without padding, longer than the budget.
        steps : int
            Decode steps per prompt.
        threshold : float or None
            Highest CPU share allowed, in (0, 1]. ``None``: ``config.recall`` if that is a float, else 0.12.

        Returns
        -------
        RecallIntervals

        Raises
        ------
        ConfigError
            On one tier, for another method than ``scout``, or for prompts that are no token ids or fit the budget.
        PatchError
            If the patch was removed.

        Examples
        --------
        >>> handle = scout_hf.patch(model, split="cpu", budget=64, block_size=16)
        >>> handle.profile_recall([ids], steps=8).save("recall.json")
        """
        if self.model.__dict__.get(HANDLE) is not self:
            raise PatchError("this patch was removed; patch the model again to profile it")
        return profile_recall(self, prompts, steps, threshold)

    def trace(self, path: str | os.PathLike[str], steps: int = 2) -> contextlib.AbstractContextManager[Trace]:
        """Record a timeline of the last decode steps in a ``with`` block.

        Parameters
        ----------
        path : str or path
            File for the Chrome trace events (https://ui.perfetto.dev, chrome://tracing), ending in ``.json``. A picture
            of the last step is written beside it, ending in ``.png``. Both are written when the block ends without an
            error.
        steps : int
            How many of the last decode steps to keep. Only the thread that decodes first in the block is recorded.

        Returns
        -------
        context manager of Trace
            ``path``, ``image`` and, after the block, ``spans`` and ``events``.

        Raises
        ------
        ConfigError
            On entry, for a wrong ``steps`` or a path that cannot be written. On exit, if nothing was decoded, or if
            matplotlib is missing, which the picture needs.
        PatchError
            If the patch was removed, or a trace is being recorded already.

        Examples
        --------
        >>> with handle.trace("step.json") as trace:
        ...     tokens = model.generate(**inputs, max_new_tokens=8)
        >>> trace.spans[0].kind
        'step'
        """
        self._check_traceable()
        return record(self, path, steps)

    def _check_traceable(self) -> None:
        if self.model.__dict__.get(HANDLE) is not self:
            raise PatchError("this patch was removed; patch the model again to trace it")
        if self._hooks.tracer is not None and self._hooks.tracer.open:
            raise PatchError("a trace of this model is being recorded already; end that `with` block first")

    def remove(self) -> None:
        """Restore the model exactly as it was before ``patch``.

        Waits for forward passes in other threads. A ``generate()`` that is running there continues with stock
        attention over all that its cache holds.

        Raises
        ------
        PatchError
            If the patch was removed already, or from inside a forward pass of the model (a hook).

        Examples
        --------
        >>> handle = scout_hf.patch(model)
        >>> handle.remove()
        """
        if self.model.__dict__.get(HANDLE) is not self:
            raise PatchError("this patch was removed already")
        self._hooks.running.end()
        self._uninstall()

    def __enter__(self) -> Handle:
        if self.model.__dict__.get(HANDLE) is not self:
            raise PatchError("this patch was removed; patch the model again")
        return self

    def __exit__(self, *error: object) -> None:
        if self.model.__dict__.get(HANDLE) is self:
            self.remove()

    def __repr__(self) -> str:
        state = "patched" if self.model.__dict__.get(HANDLE) is self else "removed"
        exact = "exact" if self.exact else "not exact"
        return f"Handle({type(self.model).__name__}, {self.config.in_brief}, {exact}, {state})"

    # -- installation -------------------------------------------------------------------------------------------

    def _install(self) -> None:
        # Set first and deleted last, so that unpatch() finds a handle whose removal was interrupted.
        if self.model.__dict__.setdefault(HANDLE, self) is not self:
            raise PatchError(_ALREADY)  # by another thread, since patch() looked
        self._changes.make(self._names)
        self._hooks.install(self._changes)
        for change in changes_of_decoder(self._decoder, self.config):
            self._changes.make(change)
        for change in changes_of_generate(self.model, self.new_cache, self._hooks, self._reuse, self._drafting):
            self._changes.make(change)

    def _uninstall(self) -> None:
        call_all(self._restore, self._hooks.end)

    def _restore(self) -> None:
        self._changes.undo()
        if self.model.__dict__.get(HANDLE) is self:
            del self.model.__dict__[HANDLE]


def _drop_leftovers(model: torch.nn.Module) -> None:
    """Delete the attributes that a shallow copy took from a patched model, once that patch is removed."""
    own = model.__dict__
    handle = own.get(HANDLE)
    if handle is not None and handle.model is not model and handle.model.__dict__.get(HANDLE) is not handle:
        drop_ours(own)
        del own[HANDLE]
