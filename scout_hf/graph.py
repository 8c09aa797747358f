"""Captures a decode step as a CUDA graph and replays it while its assumptions hold.

A replay runs no Python. So all numbers that change from step to step are on the device, in a :class:`Clock`, and the
host's state is updated around the replay. Steps that cannot be captured run as usual.

Around a replay nothing is launched per layer: one native call submits the CPU's jobs of all layers, and what a capture
assumes is asked for only after something has changed. A block that a step fills is written back by a second graph.
"""

from __future__ import annotations

import inspect
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from scout_hf.cache import ScoutCache
from scout_hf.compat.cache_names import CACHE, given_cache
from scout_hf.cuda_graph import CudaGraph
from scout_hf.graph_clock import Clock
from scout_hf.graph_fill import BlockFills
from scout_hf.kernels.cpu import StepJobs
from scout_hf.methods import Method
from scout_hf.methods.replays import ReplayCounts, Standing
from scout_hf.step import Step, active_step
from scout_hf.stores import TwoTierKV

# Steps that run without a graph first, to compile kernels and allocate buffers.
WARM_STEPS = 2
# Replays between two steps that compare predicted and real queries.
COMPARE_EVERY = 64
INPUTS = ("input_ids", "inputs_embeds", "position_ids")


def can_capture(device: torch.device) -> bool:
    """Whether steps on this device can be captured."""
    return device.type == "cuda"


class _Held(NamedTuple):
    """The methods and stores of a step's layers that hold tokens; see ``Method.capture_key``."""

    methods: list[Method]
    kvs: list[TwoTierKV]

    @classmethod
    def of(cls, step: Step) -> _Held:
        methods = [layer.method for layer in step.cache.scout_layers if layer.method is not None]
        return cls(methods, cast("list[TwoTierKV]", [method.kv for method in methods]))


@dataclass
class Ready:
    """What replays need while nothing changes: prepared once, see ``Method.prepare_replays``.

    ``call`` and ``block`` are those of the step in which it was prepared.
    """

    held: _Held
    call: Any
    block: int
    standing: Standing
    jobs: StepJobs | None
    counts: ReplayCounts

    def holds(self, step: Step, call: Any) -> bool:
        """Whether it holds for this step too."""
        return self.standing.valid and self.call == call and self.block == _block(step, self.held)


def _block(step: Step, held: _Held) -> int:
    return step.tokens // held.kvs[0].block_size


@dataclass
class Captured:
    """A captured step and its assumptions.

    ``output`` is filled by every replay and returned as an output of class ``kind``. ``tokens`` is the length of the
    last step that ran.
    """

    graph: CudaGraph
    clock: Clock
    key: Any
    inputs: dict[str, torch.Tensor]
    kind: type
    output: dict[str, torch.Tensor]
    tokens: int
    ready: Ready
    fills: BlockFills

    def covers(self, step: Step) -> bool:
        """Whether its padding mask is that of this step."""
        mask = self.clock.padding_mask
        return mask is None or self.tokens + 1 == step.tokens <= mask.shape[1]


@dataclass
class Capture:
    """State of one cache: how many of its steps could be captured, the captured one, and replays since a comparison."""

    steps: int = 0
    graph: Captured | None = None
    replays: int = 0


class _CaptureError(Exception):
    """A step could not be captured; the cause says why."""


class StepGraphs:
    """Replaces the ``forward`` of a decoder: captures and replays its decode steps.

    Parameters
    ----------
    forward : callable
        The previous ``forward``, which accelerate may have wrapped.
    config : PreTrainedConfig
        Config of the decoder.
    """

    def __init__(self, forward: Callable[..., Any], config: Any):
        self._forward, self._config = forward, config
        self._names = list(inspect.signature(forward).parameters)
        self._start_empty()

    def _start_empty(self) -> None:
        self._captures: weakref.WeakKeyDictionary[ScoutCache, Capture] = weakref.WeakKeyDictionary()
        self._streams: dict[torch.device, Any] = {}
        self._failed = False
        # Jobs of two threads, expected in one order and posted in another, would deadlock: all passes with a ScoutCache
        # take turns here, captured or not.
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("_forward", "_names", "_config")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_empty()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step = active_step()
        if step is None:
            return self._forward(*args, **kwargs)
        with self._lock:
            return self._pass(step, args, kwargs)

    def _pass(self, step: Step, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(self._names, args)), **kwargs}
        if step.mask is None and given.get("position_ids") is None:
            # As models do, but computed from a host number.
            inputs = next(given[name] for name in INPUTS if given.get(name) is not None)
            given["position_ids"] = torch.full((1, 1), step.tokens - 1, dtype=torch.int64, device=inputs.device)
        call = None if self._failed else self._call(step, given)
        if call is None:
            return self._forward(*args, **kwargs)
        found = self._captures.get(step.cache)
        captured = None if found is None else found.graph
        known = captured is not None and captured.ready.holds(step, call)
        held = captured.ready.held if captured is not None and known else _Held.of(step)
        key = captured.key if captured is not None and known else self._key(step, held, call)
        if key is None:
            return self._forward(*args, **kwargs)
        capture = self._captures.setdefault(step.cache, Capture())
        capture.steps += 1
        if capture.steps <= WARM_STEPS:
            return self._forward(*args, **kwargs)
        if capture.replays >= COMPARE_EVERY and any(method.compares for method in held.methods):
            return self._compare(step, capture, args, kwargs)
        try:
            if captured is None or captured.key != key or not captured.covers(step):
                captured = self._capture(step, held, capture, given, call, key)
                return self._finish(step, capture, captured)
            if not known:
                captured.ready = self._prepare(step, held, captured.clock, call, capture)
            return self._run(step, capture, captured, given)
        except _CaptureError as failed:
            # No state has changed yet: the step can run without a graph.
            error = failed.__cause__ or failed
            if not isinstance(error, Exception):
                raise error from None
            self._failed = True
            warnings.warn(
                f"hand_over='graph' continues without graphs, because a step could not be captured: {error}",
                stacklevel=2,
            )
            return self._forward(*args, **kwargs)

    # -- a step ---------------------------------------------------------------------------------------------------

    def _call(self, step: Step, given: dict[str, Any]) -> Any:
        """What a captured step assumes of the call, or None if such a call cannot be captured."""
        usual = step.queries == 1 and step.monitor is None and not torch.is_grad_enabled()
        known = (*INPUTS, CACHE, "past_key_values", "attention_mask", "use_cache", "return_dict", "cache_position")
        usual = usual and "position_ids" in self._names and given.get("position_ids") is not None
        usual = usual and given_cache(given) is step.cache and not self._asks_the_device()
        if not usual or any(value is not None for name, value in given.items() if name not in known):
            return None
        inputs = tuple((name, given[name].shape, given[name].device) for name in INPUTS if given.get(name) is not None)
        # Embeddings on another device would run during capture only, not in replays.
        devices = {device for _, _, device in inputs}
        if len(devices) != 1 or not can_capture(*devices):
            return None
        return inputs, step.mask is None, torch.is_inference_mode_enabled(), step.attends_all

    def _key(self, step: Step, held: _Held, call: Any) -> Any:
        """The assumptions of a captured step, or None if this step cannot be captured."""
        if not held.kvs or len(held.methods) != len(step.cache.layers) or step.cache.stored_by:
            return None
        # Reordered states are new tensors, of which no key of a method tells.
        if step.cache.has_states:
            return None
        layers = tuple(method.capture_key(step) for method in held.methods)
        if None in layers or len({kv.host.blocks for kv in held.kvs}) != 1:
            return None
        here = {device for _, _, device in call[0]}
        return (call, layers) if {kv.device for kv in held.kvs} == here else None

    def _asks_the_device(self) -> bool:
        """Whether the model synchronises with the device in a step, or returns more than its last hidden state."""
        config = self._config
        ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        kinds = [ropes, *(part for part in ropes.values() if isinstance(part, dict))]
        grows = any(part.get("rope_type", part.get("type")) in ("dynamic", "longrope") for part in kinds)
        return grows or any(getattr(config, f"output_{what}", False) for what in ("hidden_states", "attentions"))

    def _compare(self, step: Step, capture: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A step without a graph, in which layers compare predicted and real query."""
        capture.replays, step.compares = 0, True
        output = self._forward(*args, **kwargs)
        if capture.graph is not None:
            capture.graph.tokens = step.tokens
        return output

    def _capture(
        self, step: Step, held: _Held, capture: Capture, given: dict[str, Any], call: Any, key: Any
    ) -> Captured:
        device = held.kvs[0].device
        if device.type == "cuda" and device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        # These tensors are also written to outside inference mode.
        with torch.inference_mode(False), torch.no_grad():
            clock = Clock(len(step.cache.layers), device, step.mask)
            inputs = {name: given[name].clone() for name in INPUTS if given.get(name) is not None}
        graph = CudaGraph(device, self._streams.get(device))
        fixed = {name: value for name, value in given.items() if name not in (*INPUTS, "attention_mask")}
        try:
            ready = self._prepare(step, held, clock, call, capture)
            self._start(step, ready, clock)
            step.clock = clock
            step.links.forget_captured(device)
            output = graph.capture(lambda: self._forward(**fixed, **inputs), lambda: step.links.join_captured(device))
        except BaseException as error:
            self._abort(step, held, capture)
            raise _CaptureError from error
        finally:
            step.clock = None
        for layer in step.cache.scout_layers:
            layer.incoming = {}
        # Without the cache, which would keep itself alive through its capture.
        kept = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
        fills = BlockFills(clock, device, self._streams.get(device))
        capture.graph = Captured(graph, clock, key, inputs, type(output), kept, step.tokens, ready, fills)
        return capture.graph

    def _prepare(self, step: Step, held: _Held, clock: Clock, call: Any, capture: Capture) -> Ready:
        """What this step and those after it need, until something changes."""
        if capture.graph is not None:
            capture.graph.ready.counts.end()
        standing = Standing()
        for method in held.methods:
            method.standing = standing
        parts = [method.prepare_replays(step, clock.padding_mask_here) for method in held.methods]
        jobs = [part.job for part in parts if part.job is not None]
        together = step.backend.together(jobs) if jobs else None
        counts = ReplayCounts(step, parts, held.kvs[0].block_size, capture)
        return Ready(held, call, _block(step, held), standing, together, counts)

    def _run(self, step: Step, capture: Capture, captured: Captured, given: dict[str, Any]) -> Any:
        try:
            for name, fixed in captured.inputs.items():
                fixed.copy_(given[name], non_blocking=True)
            self._start(step, captured.ready, captured.clock)
        except BaseException:
            self._abort(step, captured.ready.held, capture)
            raise
        return self._finish(step, capture, captured)

    def _start(self, step: Step, ready: Ready, clock: Clock) -> None:
        if step.counters.history is not None:
            step.counters.fold()  # which wants every step by itself
        shares = [method.before_replay(step) for method in ready.held.methods]
        if ready.jobs is not None:
            step.backend.start_step(ready.jobs)
        clock.set(step.tokens, ready.held.kvs[0].host.blocks, shares)

    def _finish(self, step: Step, capture: Capture, captured: Captured) -> Any:
        ready = captured.ready
        captured.graph.replay()
        captured.tokens = step.tokens
        capture.replays += 1
        kv = ready.held.kvs[0]
        ready.counts.add(step.context(), step.behind(kv.host.length, kv.device))
        for method in ready.held.methods:
            method.after_replay(step)
        try:
            captured.fills.write_back(step, ready.held.methods)
        except BaseException:
            capture.graph = None  # whose count of launches may be ahead of the device's
            raise
        # The next replay overwrites these tensors: the caller gets copies.
        output = {name: value.clone() for name, value in captured.output.items()}
        return captured.kind(**output, **{CACHE: step.cache})

    def _abort(self, step: Step, held: _Held, capture: Capture) -> None:
        """Cancel the step that the CPU expects, so that nothing waits for it."""
        capture.graph = None
        for device in {kv.device for kv in held.kvs}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the step before may still be running
        for layer in step.cache.scout_layers:
            layer.incoming = {}
        for method in held.methods:
            method.abort_replay()
