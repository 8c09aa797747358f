"""patch(model): what is changed in a model so that it runs with a ScoutCache, and its exact removal."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import torch

from scout_hf.cache import ScoutCache, check_names
from scout_hf.changes import Attribute, Changes, call_all
from scout_hf.compat.cache_names import CACHE
from scout_hf.compat.unwrap import unwrapped
from scout_hf.config import ScoutConfig
from scout_hf.errors import ConfigError, PatchError
from scout_hf.generating import PREPARE, CacheForGenerate
from scout_hf.graph import StepGraphs
from scout_hf.kernels.device import find_kernels
from scout_hf.naming import AttentionNames
from scout_hf.pass_hooks import PassHooks, is_patched
from scout_hf.patches import family_of
from scout_hf.recall_intervals import RecallIntervals
from scout_hf.recall_profile import profile_recall
from scout_hf.restart import PREPARE_INPUTS, RestartingInputs
from scout_hf.selfcheck import check_unknown_family
from scout_hf.stats import Stats, summarise
from scout_hf.trace import Trace, record

HANDLE = "_scout_handle"
ATTENTIONS = ("auto", "sdpa")


def patch(
    model: torch.nn.Module, config: ScoutConfig | None = None, *, attention: str = "auto", **options: Any
) -> Handle:
    """Let ``model.generate()`` keep and attend its KV cache the way ``config`` says.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model, also inside torch.compile, PEFT or DistributedDataParallel; changed in place, undone by
        ``handle.remove()``.
    config : ScoutConfig, optional
        Settings; single fields may be given by keyword instead: ``patch(model, budget=2048)``.
    attention : {"auto", "sdpa"}, default "auto"
        What the model's attention is taken for. ``auto``: as it is where that is known to be plain, softmax over what a
        causal mask leaves; functions that users registered or replaced are refused. ``sdpa``: as plain, whatever it is;
        a prompt goes through transformers' sdpa then (eager, for soft caps and sinks) if the function is not known.

    Returns
    -------
    Handle
        Also a context manager that removes the patch at its end.

    Raises
    ------
    ConfigError
        For a setting that is not allowed.
    UnsupportedModelError
        For a model whose attention cannot be served.
    PatchError
        If the model is patched already.

    In all three cases the model stays as it was.
    """
    if attention not in ATTENTIONS:
        raise ConfigError(f"attention={attention!r} is not allowed: attention takes 'auto' or 'sdpa'; try 'auto'")
    config = ScoutConfig.from_options(config, **options)
    model = unwrapped(model)
    family = family_of(model)
    _drop_leftovers(model)
    if HANDLE in model.__dict__ or is_patched(family.decoder(model)):
        raise PatchError(_ALREADY)
    whole: Any = model  # a PreTrainedModel, whose attributes a Module does not declare
    text = whole.config.get_text_config(decoder=True)
    check_names(config, text, len(family.layers(family.decoder(model))))
    find_kernels(config.gpu_kernels, whole.device)
    handle_of = functools.partial(Handle, config=config, family=family, any_attention=attention == "sdpa")
    handle = handle_of(model)
    try:
        check_unknown_family(model, family, handle_of, handle._names.foreign)
        handle._install()
        return handle
    except BaseException:
        handle._uninstall()
        raise


def unpatch(model: torch.nn.Module) -> None:
    """Undo ``patch(model)``. Raises PatchError if the model is not patched."""
    model = unwrapped(model)
    _drop_leftovers(model)
    handle = model.__dict__.get(HANDLE)
    if handle is None:
        raise PatchError("this model is not patched: nothing to undo")
    if handle.model is not model:
        raise PatchError("this is a shallow copy of a patched model: unpatch the model that it was copied from")
    handle.remove()


_ALREADY = (
    "this model is patched already (or another one with the same decoder); call scout_hf.unpatch(model) first, "
    f"or pass a ScoutCache with other settings as {CACHE}"
)


class Handle:
    """What ``patch`` returns: statistics, profiling and removal. Copies of the model carry copies of it."""

    def __init__(self, model: torch.nn.Module, config: ScoutConfig, family: Any, any_attention: bool = False):
        self.model, self.config, self._family = model, config, family
        self._decoder = family.decoder(model)
        self._names = AttentionNames(self._decoder, family.layers(self._decoder), any_attention)
        self._hooks = PassHooks(model, config, family, self._names)
        self._changes = Changes()

    # -- what a user calls --------------------------------------------------------------------------------------

    @property
    def exact(self) -> bool:
        """Whether these settings attend to everything with the real query."""
        return self._hooks.is_exact(self.config)

    def stats(self) -> Stats:
        """What was attended, where, and what it cost, since ``patch`` or ``reset_stats``; prints as a table."""
        hooks, counters = self._hooks, self._hooks.counters
        hooks.monitor.collect(wait=True)
        exact = counters.approximate_steps == 0 if counters.steps else self.exact
        return summarise(counters, self.config.method, exact, dict(hooks.kv_bytes), hooks.huge_page_bytes)

    def reset_stats(self) -> None:
        """Start counting again at 0."""
        self._hooks.monitor.forget()
        self._hooks.counters.reset()

    def new_cache(self, **options: Any) -> ScoutCache:
        """An empty cache for this model, with single settings replaced by keyword."""
        cache = ScoutCache(self.model.config, self.config, **options)
        self._hooks.counters.alive.add(cache)
        return cache

    def profile_recall(self, prompts: Any, steps: int = 48, threshold: float | None = None) -> RecallIntervals:
        """Measure recall intervals per layer on prompts; see :func:`scout_hf.recall_profile.profile_recall`."""
        if self.model.__dict__.get(HANDLE) is not self:
            raise PatchError("this patch was removed; patch the model again to profile it")
        return profile_recall(self, prompts, steps, threshold)

    def trace(self, path: str | os.PathLike[str], steps: int = 2) -> contextlib.AbstractContextManager[Trace]:
        """``with handle.trace("step.json"): model.generate(...)`` writes a timeline of its last decode steps.

        Parameters
        ----------
        path : str or path
            Chrome trace events, for https://ui.perfetto.dev or chrome://tracing; beside it a picture of the last step,
            the same name with ``.png``. Written when the block ends without an error, whole or not at all.
        steps : int
            Decode steps to keep, the last ones, of the thread that decodes first in the block.

        Returns
        -------
        context manager of Trace
            ``path``, ``image``, and, once the block has ended, ``spans`` and ``events``.

        Raises
        ------
        ConfigError
            For a wrong number, or a path that cannot be written, when the block is entered; when it ends, if nothing
            was decoded, or without matplotlib, which only the picture takes.
        PatchError
            If the patch was removed, or a trace is being recorded already.
        """
        self._check_traceable()
        return record(self, path, steps)

    def _check_traceable(self) -> None:
        if self.model.__dict__.get(HANDLE) is not self:
            raise PatchError("this patch was removed; patch the model again to trace it")
        if self._hooks.tracer is not None and self._hooks.tracer.open:
            raise PatchError("a trace of this model is being recorded already; end that `with` block first")

    def remove(self) -> None:
        """Give the model back exactly as it was, between two passes: one in another thread is waited for.

        A running ``generate()`` continues with stock attention over what its cache holds.

        Raises
        ------
        PatchError
            The second time, and from inside a forward pass of the model (a hook).
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
        settings = f"method={self.config.method!r}, budget={self.config.budget!r}"
        return f"Handle({type(self.model).__name__}, {settings}, {'exact' if self.exact else 'not exact'}, {state})"

    # -- installation -------------------------------------------------------------------------------------------

    def _install(self) -> None:
        # First, and taken away last: unpatch() finds a handle whose removal was interrupted.
        if self.model.__dict__.setdefault(HANDLE, self) is not self:
            raise PatchError(_ALREADY)  # by another thread, since patch() looked
        self._changes.make(self._names)
        self._hooks.install(self._changes)
        if self.config.hand_over == "graph":
            graphs = StepGraphs(self._decoder.forward, self._decoder.config)
            self._changes.make(Attribute(self._decoder, "forward", graphs, keep_others=True))
        prepare = CacheForGenerate(self.model, self.new_cache, self._hooks)
        self._changes.make(Attribute(self.model, PREPARE, prepare))
        inputs = RestartingInputs(getattr(self.model, PREPARE_INPUTS))
        self._changes.make(Attribute(self.model, PREPARE_INPUTS, inputs))

    def _uninstall(self) -> None:
        call_all(self._restore, self._hooks.end)

    def _restore(self) -> None:
        self._changes.undo()
        if self.model.__dict__.get(HANDLE) is self:
            del self.model.__dict__[HANDLE]


def _drop_leftovers(model: torch.nn.Module) -> None:
    """Take off what a shallow copy of a patched model has of it, once that patch is gone."""
    own = model.__dict__
    handle = own.get(HANDLE)
    if handle is not None and handle.model is not model and handle.model.__dict__.get(HANDLE) is not handle:
        for name, kind in ((PREPARE, CacheForGenerate), (PREPARE_INPUTS, RestartingInputs), (HANDLE, Handle)):
            if isinstance(own.get(name), kind):
                del own[name]
