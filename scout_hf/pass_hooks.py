"""The hooks of a patched model: at the begin of a forward pass, before each layer, and at the end."""

from __future__ import annotations

import collections
import functools
import sys
import weakref
from types import FrameType
from typing import Any

import torch

from scout_hf.ahead import Parts
from scout_hf.auto_budget import Rates
from scout_hf.awaited import hooks_reached
from scout_hf.cache import ScoutCache
from scout_hf.changes import Changes, Hook, call_all
from scout_hf.compat.cache_names import CACHE, UNREAD, given_cache
from scout_hf.compat.indexed_layers import all_choose
from scout_hf.compat.modes import keeps_tensors
from scout_hf.config import ScoutConfig
from scout_hf.counters import Counters
from scout_hf.errors import CacheStateError, PatchError, UnsupportedInputError
from scout_hf.fitting import refuse_other_depth, refuse_other_rows, refuse_over_ranks, refuse_split_heads
from scout_hf.kernels.cpu import make_backend
from scout_hf.kernels.cpu.workers import Workers
from scout_hf.methods.base import find_method
from scout_hf.monitor import Monitor
from scout_hf.naming import AttentionNames
from scout_hf.pass_inputs import named_arguments, refuse_unservable
from scout_hf.ranks import Ranks
from scout_hf.running import RunningPasses
from scout_hf.step import Inputs, Role, Step, active_step, decoder_positions
from scout_hf.stock_passes import StockWarnings, reason_of_pass
from scout_hf.stores.streams import Links
from scout_hf.trace import Tracer

BYTES_EVERY = 16


class PassHooks:
    """Opens a step when a pass with a ScoutCache begins, lets methods work one layer ahead, and closes it at the end.

    Parameters
    ----------
    model : PreTrainedModel
    config : ScoutConfig
        Settings of the patch; a pass uses those of its cache.
    family : Family
    names : AttentionNames
        Checked and renewed in each pass.
    lossless : bool
        Whether decode steps of methods that can draft are exact, except for drafts.

    Attributes
    ----------
    backend, movers, links, counters, monitor
        Shared by all steps of this model, see :class:`scout_hf.step.Step`.
    running : RunningPasses
        Passes that are running, in any thread.
    ranks : Ranks
        That the model is spread over.
    rates : dict of Rates
        What decode steps take, by rows and what else counts.
    tracer : Tracer or None
        Records decode steps while a trace is open.
    kv_bytes, huge_page_bytes
        Last measurements, see :class:`scout_hf.Stats`.
    """

    def __init__(self, model: Any, config: ScoutConfig, family: Any, names: AttentionNames, lossless: bool = False):
        self._model, self._family, self._names, self._lossless = model, family, names, lossless
        self._decoder = family.decoder(model)
        self._text_config = model.config.get_text_config(decoder=True)
        self._all_choose = all_choose(self._text_config)
        self.ranks = Ranks(model)
        refuse_over_ranks(config, self.ranks)
        refuse_split_heads(model, family, self.ranks)
        self.parts = Parts(family, self._decoder, model)
        self.backend = make_backend(config.cpu_backend, config.threads, config.spinning_us)
        # Threads for transfers that the backend cannot make, separate from attention jobs.
        self.movers, self.links = Workers(), Links()
        self.counters, self.monitor = Counters(), Monitor()
        self.running = RunningPasses()
        self.rates: dict[Any, Rates] = collections.defaultdict(Rates)
        self.stock_warnings = StockWarnings(type(model).__name__)
        self.tracer: Tracer | None = None
        self.kv_bytes: dict[str, int] = {}
        self.huge_page_bytes = 0

    def install(self, changes: Changes) -> None:
        """Register the hooks."""
        # The outer model opens the pass too: multi-modal models make their masks before they call the decoder.
        for module in {id(m): m for m in (self._model, self._decoder)}.values():
            changes.make(Hook(module.register_forward_pre_hook, self.open, with_kwargs=True))
            changes.make(Hook(module.register_forward_hook, self.close, with_kwargs=True, always_call=True))
        for index, layer in enumerate(self._family.layers(self._decoder)):
            hook = functools.partial(self.before_layer, index)
            changes.make(Hook(layer.register_forward_pre_hook, hook, with_kwargs=True))

    def end(self) -> None:
        """End all threads and an open trace; threads start again when needed."""
        tracing = () if self.tracer is None else (self.tracer.close,)
        call_all(*tracing, self.monitor.close, self._wait_for_devices, self.backend.close, self.movers.close)

    def is_exact(self, config: ScoutConfig) -> bool:
        """Whether decode steps with these settings attend to all tokens with the real query, drafts aside."""
        if self._all_choose or (self._lossless and find_method(config.method).can_draft):
            return config.host_dtype is None
        return find_method(config.method).is_exact(config, self._model.device)

    def _wait_for_devices(self) -> None:
        # Jobs that a stream waits for must not be dropped.
        for device in {weight.device for weight in self._decoder.parameters() if weight.is_cuda}:
            torch.cuda.synchronize(device)

    @keeps_tensors
    def open(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Before the model or its decoder: open a pass, unless it runs inside one."""
        if kwargs is None:
            return  # torch calls a hook this way while it is being removed
        given = named_arguments(module, args, kwargs)
        cache = given_cache(given)
        step = active_step()
        if step is not None:
            if step.cache is cache and step.root is not module:
                step.depth += 1
                if module is self._decoder and step.inputs is not None:
                    step.positions = decoder_positions(given.get("position_ids"))
                return
            if step.is_running():
                raise UnsupportedInputError(
                    "a forward pass with a ScoutCache called a patched model again from inside itself (a hook?); use "
                    "an unpatched model for the inner call, or make it before or after the pass"
                )
            # It was interrupted; torch calls no hooks for interrupts.
            step.abort()
        if UNREAD and isinstance(given.get(UNREAD), ScoutCache):
            raise UnsupportedInputError(
                f"{UNREAD}=ScoutCache(...) is ignored by this release of transformers; pass it as {CACHE}"
            )
        if self.running.ended:
            return
        if not isinstance(cache, ScoutCache):
            if module is self._decoder:
                self.counters.fell_back(reason := reason_of_pass(given))
                self.stock_warnings.tell(reason)
            return
        inputs = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if inputs is None:
            return
        refuse_unservable(module, given, inputs)
        refuse_other_depth(cache, self._text_config)
        refuse_over_ranks(cache.scout_config, self.ranks)
        hooks_reached(cache)
        rows, queries = inputs.shape[:2]
        if cache.has_states and (held := next((layer.method for layer in cache.scout_layers if layer.method), None)):
            # Before a state has changed, which cannot be rolled back.
            refuse_other_rows(held.batch, rows)
        begun = cache.guard.changes
        marks, tokens = cache.mark(), cache.get_seq_length() + queries
        mask, mask_here = cache.padding.of(given.get("attention_mask"), rows, tokens)
        step = Step(
            cache=cache,
            queries=queries,
            tokens=tokens,
            mask=mask,
            mask_here=mask_here,
            backend=self.backend,
            movers=self.movers,
            links=self.links,
            counters=self.counters,
            root=module,
            marks=marks,
            monitor=self.monitor if cache.scout_config.monitor else None,
            inputs={} if find_method(cache.scout_config.method).takes_inputs else None,
            keys_values=functools.partial(self.parts.keys_values, cache.layers),
            positions=decoder_positions(given.get("position_ids")) if module is self._decoder else None,
            drafts=self._lossless,
            role=cache.role,
            frame=_calling_frame(),
        )
        if not self.running.enter(step):
            return
        self._names.renew()
        try:
            cache.guard.enter_pass(step, begun)
        except CacheStateError:
            self.running.leave(step)
            cache.padding.forget()
            raise
        if step.queries == 1:
            if self.tracer is not None:
                self.tracer.begin(step)
            exact = self._begin_step(step, rows)
            self.counters.steps += 1
            self.counters.approximate_steps += not exact and step.role is not Role.DRAFT
        else:
            exact = True
            self.counters.prefill_tokens += step.queries if step.role is Role.ORDINARY else 0
        self.counters.alive.add(cache)
        cache.filled_by = weakref.ref(self._model)
        if step.role is Role.ORDINARY:
            self.counters.pace.begin(step, inputs)
        cache.log.add(given, tokens - queries, exact, cache.guard.changes)

    def _begin_step(self, step: Step, rows: int) -> bool:
        """Whether a decode step is exact."""
        config, kind = step.cache.scout_config, find_method(step.cache.scout_config.method)
        if step.role is Role.DRAFT:
            return False
        if self._all_choose:
            return self.is_exact(config)
        if self._lossless and kind.can_draft and not kind.is_exact(config, self._model.device):
            step.attends_all = True
            step.as_several = not kind.may_attend_all(config, self._model.device)
            return config.host_dtype is None
        if config.budget == "auto" and kind.may_attend_all(config, self._model.device):
            step.auto, was = step.cache.auto, step.cache.auto.decided
            step.rates = self.rates[rows, config.host_dtype, config.block_size, config.mass]
            step.attends_all = step.auto.attends_all(step.tokens, step.rates)
            if step.auto.decided != was:
                self.counters.note("budget", step.auto.in_words())
            step.auto.begin()
            return step.attends_all and config.host_dtype is None
        return self.is_exact(config)

    @keeps_tensors
    def close(self, module: torch.nn.Module, args: tuple[Any, ...], *given: Any) -> None:
        """After the model or its decoder, with an output or an error: the outermost call closes the pass."""
        output = given[-1]
        step = active_step()
        if step is None or step.backend is not self.backend:
            return
        step.depth -= 1
        if module is self._decoder and step.queries == 1:
            step.cache.late.mark(self.links)
        if step.depth:
            return
        if self.tracer is not None:
            self.tracer.end()
        unread = [layer_idx for layer in step.cache.scout_layers for layer_idx in layer.incoming]
        late = 0 if output is None else step.cache.late.found()
        if output is None or unread or late:
            step.abort()
        else:
            step.cache.end_step()
            if step.queries > 1 and step.role is not Role.CHECK:
                # The chunks of a prompt's past are larger than what a decode step copies.
                step.cache.staging.drop_free()
            if step.auto is not None and step.rates is not None:
                took = self.ranks.slowest(*step.auto.took())
                step.auto.end(step.tokens, step.attends_all, step.rates, took)
            if step.role is Role.ORDINARY:
                self.counters.pace.end()
        if unread and output is not None:
            raise PatchError(
                f"layers {unread} got keys but did not attend through scout_hf: the attention implementation was "
                "changed after patch(); unpatch the model, change it, and patch again"
            )
        if late:
            raise step.cache.late.error(late)
        if step.queries > 1 or self.counters.steps % BYTES_EVERY == 1:
            self.kv_bytes = step.cache.tier_bytes()
        if step.queries == step.tokens > 1:
            self.huge_page_bytes = step.cache.huge_page_bytes()
        # Last, so that after an error above the cache is rolled back.
        step.cache.guard.leave_pass()
        self.running.leave(step)

    @keeps_tensors
    def before_layer(
        self, index: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> None:
        """Before a layer: keep its inputs for methods that need them, and let the next layer work ahead."""
        step = active_step()
        layers = self._family.layers(self._decoder)
        if step is None or kwargs is None:
            return
        if step.inputs is not None and self.parts.untouched(index):
            hidden = args[0] if args else kwargs["hidden_states"]
            positions, own = step.positions, kwargs.get("position_ids")
            if own is not None and (positions is None or positions.dim() == 2):
                positions = own
            if hidden.dim() == 3:  # Gemma 3n stacks several
                step.inputs[index] = Inputs(hidden, positions)
        if step.queries != 1 or step.as_several:
            return
        count = len(layers)
        following = (index + 1) % min(count, step.cache.depth or count)
        held = step.cache.layer_of(following)
        if held is None:
            return
        method = held.method_of(following)
        if method is None or not method.wants_ahead:
            return
        if not method.needs_query:
            method.ahead(step, None)
        elif following:
            hidden = args[0] if args else kwargs["hidden_states"]
            query = self.parts.query(step, following, layers[following], hidden, kwargs, held)
            if query is not None:
                method.ahead(step, query)


def is_ours(hook: Any) -> bool:
    """Whether a hook of a module is one of a patch."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return isinstance(getattr(hook, "__self__", None), PassHooks)


def is_patched(decoder: torch.nn.Module) -> bool:
    """Whether a decoder has hooks of a patch, also one of another model that shares it."""
    hooks = decoder._forward_pre_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), PassHooks) for hook in hooks)


def _calling_frame() -> FrameType | None:
    """The frame of the module call that runs this pre-hook; None under torch.compile."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name not in ("inner", "_call_impl"):
        frame = frame.f_back
    return frame
