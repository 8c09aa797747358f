"""patch(model): the hooks that run a forward pass with a ScoutCache, and their exact removal."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationMode

from scout_hf.ahead import Parts
from scout_hf.awaited import await_hooks, hooks_reached
from scout_hf.cache import ScoutCache, check_names
from scout_hf.cache_names import CACHE, UNREAD, given_cache
from scout_hf.config import ScoutConfig
from scout_hf.counters import Counters
from scout_hf.errors import ConfigError, PatchError, UnsupportedInputError
from scout_hf.fitting import refuse_other_depth
from scout_hf.graph import StepGraphs
from scout_hf.kernels.cpu import make_backend
from scout_hf.kernels.cpu.workers import Workers
from scout_hf.kernels.device import find_kernels
from scout_hf.methods.base import find_method
from scout_hf.modes import keeps_tensors
from scout_hf.monitor import Monitor
from scout_hf.naming import AttentionNames
from scout_hf.pass_inputs import named_arguments, refuse_unservable
from scout_hf.patches import family_of
from scout_hf.profiling import profile_recall
from scout_hf.recall import RecallIntervals
from scout_hf.restart import PREPARE_INPUTS, RestartingInputs
from scout_hf.selfcheck import check_unknown_family
from scout_hf.stats import Stats, summarise
from scout_hf.step import Inputs, Step, active_step, grid_positions
from scout_hf.stock_passes import MEANT, explain, reason_of_pass, reason_to_generate_with_stock
from scout_hf.stores.link import Links
from scout_hf.trace import Trace, Tracer, record
from scout_hf.unwrap import unwrapped

HANDLE = "_scout_handle"
PREPARE = "_prepare_cache_for_generation"
BYTES_EVERY = 16
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
    if HANDLE in model.__dict__ or _has_hooks_of_ours(family.decoder(model)):
        raise PatchError(
            "this model is patched already (or another one with the same decoder); call scout_hf.unpatch(model) first, "
            f"or pass a ScoutCache with other settings as {CACHE}"
        )
    text = model.config.get_text_config(decoder=True)
    check_names(config, text, len(family.layers(family.decoder(model))))
    find_kernels(config.gpu_kernels, model.device)
    handle_of = functools.partial(Handle, config=config, family=family, any_attention=attention == "sdpa")
    handle = handle_of(model)
    try:
        check_unknown_family(model, family, handle_of, handle._names.foreign)
        handle._install()
    except BaseException:
        handle._uninstall()
        raise
    return handle


def unpatch(model: torch.nn.Module) -> None:
    """Undo ``patch(model)``. Raises PatchError if the model is not patched."""
    model = unwrapped(model)
    handle = model.__dict__.get(HANDLE)
    if handle is None:
        raise PatchError("this model is not patched: nothing to undo")
    handle.remove()


class Handle:
    """What ``patch`` returns: statistics, profiling and removal. Copies of the model carry copies of it."""

    def __init__(self, model: torch.nn.Module, config: ScoutConfig, family: Any, any_attention: bool = False):
        self.model, self.config, self._family = model, config, family
        self._decoder = family.decoder(model)
        self._text_config = model.config.get_text_config(decoder=True)
        self._parts = Parts(family, self._decoder)
        self._backend = make_backend(config.cpu_backend, config.threads)
        # For transfers that the backend cannot make itself, apart from the jobs that attend.
        self._movers, self._links = Workers(), Links()
        self._counters = Counters()
        self._monitor = Monitor()
        self._kv_bytes: dict[str, int] = {}
        self._huge_page_bytes = 0
        self._tracer: Tracer | None = None
        self._hooks: list[Any] = []
        self._names = AttentionNames(self._decoder, family.layers(self._decoder), any_attention)
        self._prepare_before: Any = None
        self._inputs_before: Any = None
        self._forward_before: Any = None
        self._told_reasons: set[str] = set()

    # -- what a user calls --------------------------------------------------------------------------------------

    @property
    def exact(self) -> bool:
        """Whether these settings attend to everything with the real query."""
        return self._is_exact(self.config)

    def stats(self) -> Stats:
        """What was attended, where, and what it cost, since ``patch`` or ``reset_stats``; prints as a table."""
        self._monitor.collect(wait=True)
        ran = self._counters.steps > 0
        exact = self._counters.approximate_steps == 0 if ran else self.exact
        return summarise(self._counters, self.config.method, exact, dict(self._kv_bytes), self._huge_page_bytes)

    def reset_stats(self) -> None:
        """Start the tallies anew."""
        self._monitor.forget()
        self._counters.reset()

    def new_cache(self, **options: Any) -> ScoutCache:
        """An empty cache for this model, with single settings replaced by keyword."""
        cache = ScoutCache(self.model.config, self.config, **options)
        self._counters.alive.add(cache)
        return cache

    def profile_recall(self, prompts: Any, steps: int = 48, threshold: float | None = None) -> RecallIntervals:
        """Measure recall intervals per layer on prompts; see :func:`scout_hf.profiling.profile_recall`."""
        if self.model.__dict__.get(HANDLE) is not self:
            raise PatchError("this patch was removed; patch the model again to profile it")
        return profile_recall(self, prompts, steps, threshold)

    def trace(self, path: str | os.PathLike, steps: int = 2) -> contextlib.AbstractContextManager[Trace]:
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
        if self._tracer is not None and self._tracer.open:
            raise PatchError("a trace of this model is being recorded already; end that `with` block first")

    def remove(self) -> None:
        """Give the model back exactly as it was. Raises PatchError the second time."""
        if self.model.__dict__.get(HANDLE) is not self:
            raise PatchError("this patch was removed already")
        self._uninstall()

    def __enter__(self) -> Handle:
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
        layers = self._family.layers(self._decoder)
        self._names.put_on()
        # The outer model opens the pass too: multi-modal models make their masks before the decoder is called.
        for module in {id(m): m for m in (self.model, self._decoder)}.values():
            self._hooks.append(module.register_forward_pre_hook(self._open, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._close, with_kwargs=True, always_call=True))
        for index, layer in enumerate(layers):
            hook = functools.partial(self._before_layer, index)
            self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        if self.config.hand_over == "graph":
            self._forward_before = self._decoder.__dict__.get("forward")
            self._decoder.__dict__["forward"] = StepGraphs(self._decoder.forward, self._decoder.config)
        self._prepare_before = self.model.__dict__.get(PREPARE)
        self.model.__dict__[PREPARE] = self._prepare_cache
        self._inputs_before = self.model.__dict__.get(PREPARE_INPUTS)
        self.model.__dict__[PREPARE_INPUTS] = RestartingInputs(getattr(self.model, PREPARE_INPUTS))
        self.model.__dict__[HANDLE] = self

    def _uninstall(self) -> None:
        if self._tracer is not None:
            self._tracer.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._names.take_off()
        if isinstance(self._decoder.__dict__.get("forward"), StepGraphs):
            del self._decoder.__dict__["forward"]
            if self._forward_before is not None:
                self._decoder.__dict__["forward"] = self._forward_before
        if self.model.__dict__.pop(HANDLE, None) is not None:
            for name, before in ((PREPARE, self._prepare_before), (PREPARE_INPUTS, self._inputs_before)):
                del self.model.__dict__[name]
                if before is not None:
                    self.model.__dict__[name] = before
        self._monitor.close()
        for device in {weight.device for weight in self._decoder.parameters() if weight.is_cuda}:
            torch.cuda.synchronize(device)  # jobs that a stream still waits for must not be dropped
        self._backend.close()
        self._movers.close()

    def _prepare_cache(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        self._counters.pace.new_call()
        reason = reason_to_generate_with_stock(self.model, generation_config, model_kwargs)
        if reason is None and given_cache(model_kwargs) is None:
            cache = model_kwargs[CACHE] = self.new_cache()
            await_hooks(cache, type(self.model).__name__)
            rolls_back = hasattr(cache, "activate_past_recording")
            if getattr(generation_config, "is_assistant", False) and rolls_back:
                cache.activate_past_recording()
            if generation_mode == GenerationMode.ASSISTED_GENERATION and not rolls_back:
                cache.keep_windows_whole()
            return None
        prepare = self._prepare_before or functools.partial(getattr(type(self.model), PREPARE), self.model)
        result = prepare(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        if reason is not None:
            explain(given_cache(model_kwargs), reason)
            self._warn_of_stock(reason)
        return result

    def _warn_of_stock(self, reason: str) -> None:
        if reason in MEANT or reason in self._told_reasons:
            return
        self._told_reasons.add(reason)
        warnings.warn(
            f"the patched {type(self.model).__name__} runs stock attention here: {reason}. It is right, and "
            "nothing of scout_hf is used; handle.stats() counts such passes, and this reason is told once",
            stacklevel=3,
        )

    # -- hooks --------------------------------------------------------------------------------------------------

    @keeps_tensors
    def _open(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        given = named_arguments(module, args, kwargs)
        cache = given_cache(given)
        step = active_step()
        if step is not None:
            if step.cache is cache and step.root is not module:
                step.depth += 1
                if module is self._decoder and step.inputs is not None:
                    step.positions = grid_positions(given.get("position_ids"))
                return
            if step.is_running():
                raise UnsupportedInputError(
                    "a forward pass with a ScoutCache called a patched model again from inside itself (a hook?); give "
                    "the inner call to an unpatched model, or make it before or after"
                )
            # Left behind by an interrupt, which no hook of torch sees.
            step.abort()
        if UNREAD and isinstance(given.get(UNREAD), ScoutCache):
            raise UnsupportedInputError(f"{UNREAD}=ScoutCache(...): this release of transformers calls it {CACHE}")
        if not isinstance(cache, ScoutCache):
            if module is self._decoder:
                self._counters.fell_back(reason := reason_of_pass(given))
                self._warn_of_stock(reason)
            return
        inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if inputs is None:
            return
        refuse_unservable(module, given, inputs)
        refuse_other_depth(cache, self._text_config)
        hooks_reached(cache)
        self._names.renew()
        rows, queries = inputs.shape[:2]
        marks, tokens = cache.mark(), cache.get_seq_length() + queries
        mask, mask_here = cache.padding.of(given.get("attention_mask"), rows, tokens)
        step = Step(
            cache=cache,
            queries=queries,
            tokens=tokens,
            mask=mask,
            mask_here=mask_here,
            backend=self._backend,
            movers=self._movers,
            links=self._links,
            counters=self._counters,
            root=module,
            marks=marks,
            monitor=self._monitor if cache.scout_config.monitor else None,
            inputs={} if find_method(cache.scout_config.method).takes_inputs else None,
            keys_values=self._parts.keys_values,
            positions=grid_positions(given.get("position_ids")) if module is self._decoder else None,
            frame=_calling_frame(),
        )
        if step.queries == 1:
            if self._tracer is not None:
                self._tracer.begin(step)
            self._counters.steps += 1
            self._counters.approximate_steps += not self._is_exact(cache.scout_config)
        else:
            self._counters.prefill_tokens += step.queries
        self._counters.alive.add(cache)
        self._counters.pace.begin(step, inputs)
        cache.whole.enter_pass(step)

    @keeps_tensors
    def _close(self, module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        step = active_step()
        if step is None or step.backend is not self._backend:
            return
        step.depth -= 1
        if step.depth:
            return
        if self._tracer is not None:
            self._tracer.end()
        unread = [layer.layer_idx for layer in step.cache.scout_layers if layer.incoming is not None]
        if output is None or unread:
            step.abort()
        else:
            step.cache.end_step()
            self._counters.pace.end()
        if unread and output is not None:
            raise PatchError(
                f"layers {unread} stored keys but did not attend through scout_hf: the attention implementation was "
                "changed after patch(); unpatch the model, change it, and patch again"
            )
        if step.queries > 1 or self._counters.steps % BYTES_EVERY == 1:
            self._kv_bytes = step.cache.tier_bytes()
        if step.queries == step.tokens > 1:
            self._huge_page_bytes = step.cache.huge_page_bytes()
        # Last: whoever gets an error instead of the output has a cache without these tokens.
        step.cache.whole.leave_pass()

    @keeps_tensors
    def _before_layer(self, index: int, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        step = active_step()
        layers = self._family.layers(self._decoder)
        if step is None or index >= len(step.cache.layers):
            return
        if step.inputs is not None and self._parts.untouched(index):
            hidden = args[0] if args else kwargs["hidden_states"]
            positions = kwargs.get("position_ids") if step.positions is None else step.positions
            step.inputs[index] = Inputs(hidden, positions)
        if step.queries != 1:
            return
        following = (index + 1) % min(len(layers), len(step.cache.layers))
        method = getattr(step.cache.layers[following], "method", None)
        if method is None or not method.wants_ahead:
            return
        if not method.needs_query:
            method.ahead(step, None)
        elif following:
            hidden = args[0] if args else kwargs["hidden_states"]
            query = self._parts.query(step, following, hidden, kwargs, method)
            if query is not None:
                method.ahead(step, query)

    def _is_exact(self, config: ScoutConfig) -> bool:
        return find_method(config.method).is_exact(config, self.model.device)


def _has_hooks_of_ours(decoder: torch.nn.Module) -> bool:
    return any(isinstance(getattr(hook, "__self__", None), Handle) for hook in decoder._forward_pre_hooks.values())


def _calling_frame() -> Any:
    """The frame of the module call whose pre-hook asks; None under torch.compile, which has none."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_name not in ("inner", "_call_impl"):
        frame = frame.f_back
    return frame
