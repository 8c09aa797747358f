"""Drafts inside ``generate()``, whose own loop stays in charge.

The loop asks for one token after the other. A pass that it asks for is answered from an exact pass over this token and
drafts of the next ones. As long as the loop chooses what was drafted, its next passes are answered from the same one;
when it chooses otherwise, the rest is taken back. So processors, criteria, sampling, streamers and outputs are the
loop's, and see what they would see without drafts.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationMode

from scout_hf.cache import ScoutCache
from scout_hf.compat.cache_names import given_cache
from scout_hf.compat.modes import keeps_tensors
from scout_hf.config import ScoutConfig
from scout_hf.counters import Counters
from scout_hf.drafting.picks import Picks
from scout_hf.drafting.rounds import Round, check, draft, unknown_inputs, wait
from scout_hf.methods.base import find_method
from scout_hf.ranks import Ranks
from scout_hf.running import RunningPasses

NOTE = "drafts"
OTHER_LOOPS = ("assistant_model", "custom_generate", "synced_gpus")
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class Call:
    """One ``generate()`` in one thread.

    Attributes
    ----------
    reason : str or None
        Why it has no drafts.
    picks : Picks or None
        None before the loop begins, and for a call without drafts.
    ids : Tensor (rows, tokens) or None
        All tokens up to the one that the next pass takes.
    round : Round or None
        The last one, while the loop is inside it.
    """

    def __init__(self, reason: str | None):
        self.reason = reason
        self.picks: Picks | None = None
        self.ids: torch.Tensor | None = None
        self.round: Round | None = None
        self.begun = 0.0


class Drafting:
    """The drafts of one patched model, and the calls that use them.

    Parameters
    ----------
    most : int
        Tokens to draft before each check, at most.
    counters : Counters
    running : RunningPasses
        Says whether the patch was removed.
    ranks : Ranks
        Must draft the same.
    """

    def __init__(self, most: int, counters: Counters, running: RunningPasses, ranks: Ranks):
        self.most = most
        self._counters, self._running, self._ranks = counters, running, ranks
        self._calls = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Drafting, (self.most, self._counters, self._running, self._ranks)

    @property
    def call(self) -> Call | None:
        """The call of this thread."""
        return getattr(self._calls, "now", None)

    @contextlib.contextmanager
    def calling(self, reason: str | None) -> Iterator[None]:
        """A ``generate()`` of this thread; at its end the cache holds what the loop has come to."""
        before, now = self.call, Call(reason)
        self._calls.now = now
        try:
            yield
        finally:
            self._calls.now = before
            self._end_round(now)
            if now.reason is not None:
                self._counters.note(NOTE, f"none for a call with {now.reason}")

    def begin(self, processors: Any, generation_config: Any, prompt: int) -> None:
        """The processors of a call are known, before its loop begins."""
        call = self.call
        if call is None or call.reason is not None:
            return
        mode = generation_config.get_generation_mode()
        if mode not in MODES:
            call.reason = f"{mode.value.replace('_', ' ')}"
        elif generation_config.output_attentions or generation_config.output_hidden_states:
            call.reason = "output_attentions or output_hidden_states"
        elif getattr(generation_config, "is_assistant", False):
            call.reason = "drafts of another model"
        else:
            call.picks = Picks(processors, generation_config, prompt)

    @keeps_tensors
    def chosen(self, ids: Any) -> None:
        """The loop goes on with these tokens (rows, tokens): what was drafted otherwise is taken back."""
        call = self.call
        if call is None or call.picks is None or not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            return
        call.ids = ids
        if call.round is not None and (not call.round.fits(ids[:, -1:]) or self._running.ended):
            self._end_round(call)

    def answer(self, run: Callable[..., Any], given: dict[str, Any]) -> Any:
        """A pass that the loop asks for."""
        call, ids, cache = self.call, given.get("input_ids"), given_cache(given)
        if call is None or call.picks is None or call.ids is None:
            return run(**given)
        if call.round is not None:
            if cache is call.round.cache and isinstance(ids, torch.Tensor) and call.round.fits(ids):
                return call.round.serve()
            self._end_round(call)
        if self._running.ended or not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
            return run(**given)
        reason = _why_not(cache, given)
        if reason is not None:
            call.picks, call.reason = None, reason
            return run(**given)
        most = min(self.most, call.picks.left(call.ids) - 1)
        length = self._length(cache, most)
        begun = time.perf_counter()
        if not length:
            outputs = run(**given)
            cache.auto_draft.exact_step(*self._ranks.slowest(wait(outputs) - begun))
            return outputs
        drafts = draft(run, cache, given, call.ids, call.picks, length)
        drafted = time.perf_counter()
        made = check(run, cache, given, drafts)
        took = self._ranks.slowest(drafted - begun, wait(made.outputs) - drafted)
        cache.auto_draft.round(drafts.shape[1], *took)
        self._counters.checks += 1
        call.round, call.begun = made, begun
        return made.serve()

    def _length(self, cache: ScoutCache, most: int) -> int:
        """How many tokens to draft now; what was decided is noted."""
        budget, pace = cache.scout_config.sparse_budget, cache.auto_draft
        if isinstance(budget, int) and cache.get_seq_length() < budget:
            why = "where a sparse step would attend to everything too"
            self._counters.note(NOTE, f"none within the budget of {budget} tokens, {why}; every step is exact")
            return 0
        undecided, paid, length = pace.measuring, pace.pays, pace.length(most)
        if undecided or pace.pays != paid:
            self._counters.note(NOTE, pace.in_words())
        return length

    @keeps_tensors
    def _end_round(self, call: Call) -> None:
        made, call.round = call.round, None
        if made is None:
            return
        made.take_back()
        right = made.served - 1
        # A loop that has ended says nothing about the next draft.
        wrong = int(right < made.drafts.shape[1] and self.call is call)
        pace = made.cache.auto_draft
        pace.judged(right, wrong)
        self._counters.note(NOTE, pace.in_words())
        self._counters.drafted += made.drafts.shape[1]
        self._counters.accepted += right
        self._counters.pace.add("decode", made.served * len(made.drafts), time.perf_counter() - call.begun)


class DraftingGenerate:
    """Replaces ``generate``: tells the drafts where a call begins and ends."""

    # Objects, not closures: a deep copy of the model needs its own.
    def __init__(self, generate: Callable[..., Any], drafting: Drafting):
        self._generate, self._drafting = generate, drafting

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs if len(args) < 2 else self.__signature__.bind_partial(*args, **kwargs).arguments
        reason = next((name for name in OTHER_LOOPS if given.get(name)), None)
        with self._drafting.calling(reason):
            return self._generate(*args, **kwargs)


class DraftingProcessors:
    """Replaces ``_get_logits_processor``, where settings and processors of a call are known."""

    def __init__(self, get: Callable[..., Any], drafting: Drafting):
        self._get, self._drafting = get, drafting

    def __call__(self, generation_config: Any, input_ids_seq_length: Any = None, *args: Any, **kwargs: Any) -> Any:
        processors = self._get(generation_config, input_ids_seq_length, *args, **kwargs)
        self._drafting.begin(processors, generation_config, int(input_ids_seq_length or 0))
        return processors


class DraftingInputs:
    """Replaces ``prepare_inputs_for_generation``: sees the tokens that the loop has chosen, before their pass."""

    def __init__(self, prepare: Callable[..., dict[str, Any]], drafting: Drafting):
        self._prepare, self._drafting = prepare, drafting

    @property
    def __signature__(self) -> inspect.Signature:
        """Signature of the replaced function, from which generate() reads the model's arguments."""
        return inspect.signature(self._prepare)

    def __call__(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self._drafting.chosen(input_ids)
        return self._prepare(input_ids, *args, **kwargs)


class DraftingPasses:
    """Replaces the model's own ``__call__``, through which the loop asks for decode steps; prompts go past it."""

    def __init__(self, model: Any, drafting: Drafting):
        self._model, self._drafting = model, drafting

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(type(self._model).__call__, self._model)
        return run(*args, **kwargs) if args else self._drafting.answer(run, kwargs)


def can_draft(config: ScoutConfig) -> bool:
    """Whether a cache with these settings has sparse steps to draft with, and exact passes to check them."""
    return find_method(config.method).can_draft and not config.attends_all and config.host_dtype is None


def _why_not(cache: Any, given: dict[str, Any]) -> str | None:
    """Why the next pass, and the rest of its call, has no drafts."""
    if not isinstance(cache, ScoutCache):
        return "another cache"
    if not can_draft(cache.scout_config):
        return f"a cache of {cache.scout_config.in_brief}"
    if cache.has_stock_layers:
        return "a model whose layers are not all kept by scout_hf, and cannot all take tokens back"
    if unknown := unknown_inputs(given):
        return f"the inputs {', '.join(unknown)}"
    return None
