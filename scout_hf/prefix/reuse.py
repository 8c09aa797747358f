"""Prefix reuse in ``generate()``: prompts begin with what the store knows, and what was read is added at the end."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from scout_hf.cache import ScoutCache
from scout_hf.cache_saving import KEEP_STATE
from scout_hf.compat.cache_names import CACHE, given_cache
from scout_hf.compat.modes import keeps_tensors
from scout_hf.config import ScoutConfig
from scout_hf.counters import Counters
from scout_hf.errors import ConfigError, SessionError
from scout_hf.prefix import reasons
from scout_hf.prefix.hashing import block_hashes, common_blocks, root_of
from scout_hf.prefix.keeping import Context, Stop, keep, stock_states
from scout_hf.prefix.opening import Found, fill, until
from scout_hf.prefix.store import PrefixStore, warn
from scout_hf.sessions import FORMAT, fingerprint

GENERATE, PREPARE_INPUTS = "generate", "prepare_inputs_for_generation"
LEFT = 2
STOP_TOKENS = 8192
"""How far segments of a model with stock layers are apart in a long prompt, whose states are kept there."""

SHARING_WORTH = 1024
"""Tokens of each row that are read again, up to a quarter, if rows can share pages then, instead of copying them."""

NOTE = "prefix store"


class Call:
    """One ``generate()`` in one thread.

    Attributes
    ----------
    prompt : int or None
        Tokens of the prompt, as it was given.
    cache : ScoutCache or None
        The cache that it fills, once it is known.
    found : Found or None
    version : int
        Of the weights when it began.
    stops : list of Stop
    """

    def __init__(self, prompt: int | None):
        self.prompt = prompt
        self.cache: ScoutCache | None = None
        self.context: Context | None = None
        self.found: Found | None = None
        self.version = 0
        self.stops: list[Stop] = []


class Reuse:
    """The store of one patched model, and the calls that use it.

    Parameters
    ----------
    store : PrefixStore
    model : PreTrainedModel
    counters : Counters
    is_ours : callable
        Whether a hook of a module is one of the patch.

    Raises
    ------
    ConfigError
        If keys and values of this model depend on more than the tokens before them.
    """

    def __init__(
        self, store: PrefixStore, model: Any, counters: Counters, is_ours: Callable[[Any], bool] = lambda hook: False
    ):
        self.store, self._model, self._counters, self._is_ours = store, model, counters, is_ours
        self._calls = threading.local()
        reason = reasons.of_model(model) or reasons.of_ranks(model)
        if reason is not None:
            raise ConfigError(f"store=... cannot serve {type(model).__name__}: {reason}; leave store out")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_calls"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _calls=threading.local())

    @property
    def call(self) -> Call | None:
        """The call of this thread."""
        return getattr(self._calls, "now", None)

    @contextlib.contextmanager
    def calling(self, prompt: int | None) -> Iterator[Call]:
        """A ``generate()`` of this thread, at whose end what it read is added, also after an error or interrupt."""
        before, now = self.call, Call(prompt)
        self._calls.now = now
        try:
            yield now
        except SessionError:
            self.drop_damaged(now.found)
            now.cache = None
            raise
        finally:
            self._calls.now = before
            self._keep(now)

    @keeps_tensors
    def begin(self, ids: torch.Tensor, kwargs: dict[str, Any], caller: ReusingInputs) -> int:
        """The first pass of a call: fill its cache with what is known; returns how many tokens per row that are."""
        call, cache = self.call, given_cache(kwargs)
        if call is None or call.cache is not None or not isinstance(cache, ScoutCache) or cache.get_seq_length():
            return 0
        reason = reasons.of_call(self._model, ids, kwargs, cache, self._is_ours)
        if getattr(self._model, PREPARE_INPUTS, None) is not caller:
            reason = "a wrapper that was put around the model after patch()"
        if reason is not None:
            self._counters.note(NOTE, f"not used for a call with {reason}")
            return 0
        # At least two tokens are left: a pass of one is a decode step, which may be sparse, and prompts are exact.
        most = min(ids.shape[1], call.prompt or ids.shape[1]) - max(LEFT, int(kwargs.get("logits_to_keep") or 1))
        try:
            call.context, call.version = self.context(cache.scout_config), reasons.version_of(self._model)
            call.found = self.fill(call.context, cache, ids, kwargs.get("attention_mask"), most)
        except Exception as error:
            if cache.get_seq_length():
                raise
            warn("could not be asked for this prompt, which is read", error)
            return 0
        call.cache = cache
        if cache.has_stock_layers:
            self._read_to_stops(call, ids, kwargs, caller.prepare)
        return cache.get_seq_length()

    def fill(
        self, context: Context, cache: ScoutCache, ids: torch.Tensor, mask: torch.Tensor | None, most: int
    ) -> Found | None:
        """Give an empty cache what is known of the first ``most`` tokens; None if that is nothing."""
        found = self._find(context, cache, ids, mask, most)
        if found is None:
            return None
        try:
            fill(cache, self._model, found, ids, mask)
        except SessionError as error:
            warn("could not open what it knows of this prompt, which is read again", error)
            self.drop_damaged(found)
            return None
        self._counters.found_tokens += found.tokens
        self.store.used([piece for row in set(found.pieces) for piece in row])
        return found

    def add(self, tokens: int) -> None:
        """Count tokens that were kept."""
        self._counters.kept_tokens += tokens

    def context(self, config: ScoutConfig) -> Context:
        """What decides keys and values of this model now, beside tokens."""
        made = fingerprint(self._model)
        device = self._model.device.type
        device = "cpu" if device == "meta" else device  # offloaded weights
        autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        root = root_of(
            format=FORMAT,
            model=made.key,
            block_size=config.block_size,
            host_dtype=config.host_dtype,
            autocast=autocast,
        )
        return Context(root, made.as_json(), root_of(**{name: getattr(config, name) for name in KEEP_STATE})[:32])

    def refuse_state(self) -> None:
        """Raise ConfigError if the model is in a state that its weights do not tell, such as training mode."""
        reason = reasons.of_state(self._model, self._is_ours)
        if reason is not None:
            raise ConfigError(f"a text cannot be kept with {reason}; undo that, or do without a store")

    def _find(
        self, context: Context, cache: ScoutCache, ids: torch.Tensor, mask: torch.Tensor | None, most: int
    ) -> Found | None:
        size, at_states = cache.scout_config.block_size, cache.has_stock_layers
        numbers, real = ids.cpu(), None if mask is None else mask[:, : ids.shape[1]].cpu().bool()
        pieces, padding, ends, texts = [], [], [], []
        for row in range(len(numbers)):
            left = 0 if real is None else int(real[row].to(torch.uint8).argmax())
            if real is not None and not bool(real[row, left:].all()):
                return None
            texts.append(block_hashes(numbers[row, left : max(left, most)].numpy(), size, context.root))
            found = self.store.find(context.root, texts[-1], context.chain, at_states) if texts[-1] else []
            pieces.append(found)
            padding.append(left)
            ends.append(left + (found[-1].end * size if found else 0))
        tokens = min(most, *ends)
        common = min(common_blocks(text, texts[0]) for text in texts) * size
        if not any(padding) and tokens - common <= min(SHARING_WORTH, tokens // 4):
            tokens = min(tokens, common)
        if tokens <= min(padding):
            return None
        made = Found(
            tuple(until(row, tokens - left, size) for row, left in zip(pieces, padding)), tuple(padding), tokens
        )
        # States of stock layers fit at one place only.
        return None if at_states and (not made.shares_one or tokens != ends[0]) else made

    def _read_to_stops(
        self, call: Call, ids: torch.Tensor, kwargs: dict[str, Any], prepare: Callable[..., dict[str, Any]]
    ) -> None:
        """Read a prompt up to its last whole block, and keep the states of stock layers there and at stops before."""
        cache, mask, positions = call.cache, kwargs.get("attention_mask"), kwargs.get("position_ids")
        if cache is None or (mask is not None and not bool(mask[:, : ids.shape[1]].all())):
            self._counters.note(NOTE, "not used for padded rows, as this model has layers with states of their own")
            return
        size = cache.scout_config.block_size
        last = (min(ids.shape[1], call.prompt or ids.shape[1]) - LEFT) // size * size
        here, every = cache.get_seq_length(), -(-STOP_TOKENS // size) * size
        stops = [*range(here - here % every + every, last, every), last] if last > here else []
        for stop in stops:
            part = kwargs | {"next_sequence_length": stop - here}
            if mask is not None:
                part["attention_mask"] = mask[:, :stop]
            if positions is not None:
                part["position_ids"] = positions[..., :stop]
            inputs = prepare(ids[:, :stop], **part)
            self._model(**inputs | {CACHE: cache}, return_dict=True)
            call.stops.append((stop, stock_states(cache)))
            here = stop

    @keeps_tensors
    def _keep(self, call: Call) -> None:
        cache, context = call.cache, call.context
        if cache is None or context is None or cache.guard.torn is not None:
            return
        try:
            # Weights, adapters or hooks that were changed during the call: what was read is of neither model.
            now = self.context(cache.scout_config), reasons.version_of(self._model)
            if now == (context, call.version) and reasons.of_state(self._model, self._is_ours) is None:
                self.add(keep(self.store, cache, context, call.stops))
        except Exception as error:
            # The answer is there: it must not be lost because of a full disk, or of anything else here.
            warn("did not keep what was read", error)
            self._counters.note(NOTE, f"did not keep what was read: {error}")

    def drop_damaged(self, found: Found | None) -> None:
        """Remove the segments that are not what was written, so that the next call reads the text again."""
        if found is not None:
            self.store.remove_damaged(piece for row in found.pieces for piece in row)


class ReusingInputs:
    """Replaces ``prepare_inputs_for_generation``: the first pass of a call leaves out what the store knows."""

    # An object, not a closure: a deep copy of the model needs its own.
    def __init__(self, prepare: Callable[..., dict[str, Any]], reuse: Reuse):
        self.prepare, self._reuse = prepare, reuse

    @property
    def __signature__(self) -> inspect.Signature:
        """Signature of the replaced function, from which generate() reads the model's arguments."""
        return inspect.signature(self.prepare)

    def __call__(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not args and (tokens := self._reuse.begin(input_ids, kwargs, self)):
            kwargs = kwargs | {"next_sequence_length": input_ids.shape[1] - tokens}
        return self.prepare(input_ids, *args, **kwargs)


class ReusingGenerate:
    """Replaces ``generate``: tells the store where a call begins and ends."""

    def __init__(self, generate: Callable[..., Any], reuse: Reuse):
        self._generate, self._reuse = generate, reuse

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        prompt = given.shape[-1] if isinstance(given, torch.Tensor) else None
        with self._reuse.calling(prompt):
            return self._generate(*args, **kwargs)
