"""Captures a decode step as a CUDA graph and replays it while its assumptions hold.

A replay runs no Python. So all numbers that change from step to step are on the device, in a :class:`Clock`, and the
host's state is updated around the replay. Steps that cannot be captured run as usual.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from scout_hf.cache import ScoutCache
from scout_hf.cache_layer import ScoutLayer
from scout_hf.compat.cache_names import CACHE, given_cache
from scout_hf.methods import Method
from scout_hf.step import Step, active_step
from scout_hf.stores import TwoTierKV

# Steps that run without a graph first, to compile kernels and allocate buffers.
WARM_STEPS = 2
SPARE_TOKENS = 1024
INPUTS = ("input_ids", "inputs_embeds", "position_ids")


class Clock:
    """Numbers on the device that a captured step reads instead of host values.

    Parameters
    ----------
    layers : int
    device : torch.device
    mask : Tensor (batch, tokens) of bool, or None
        Padding mask of the tokens so far, False for padding.

    Attributes
    ----------
    length, blocks : Tensor (1,) of int32
        Tokens per row with the new one; whole blocks on the host.
    shares : Tensor (layers,) of float32
        The CPU share at which a layer recalls.
    padding_mask, padding_mask_here : Tensor (batch, capacity) of bool, or None
        The padding mask with spare capacity for tokens to come, all True; and the same on the CPU.
    """

    def __init__(self, layers: int, device: torch.device, mask: torch.Tensor | None):
        self.length, self.blocks = torch.zeros((2, 1), dtype=torch.int32, device=device)
        self.shares = torch.zeros(layers, dtype=torch.float32, device=device)
        self._shares: list[float] = []
        self.padding_mask: torch.Tensor | None = None
        self.padding_mask_here: torch.Tensor | None = None
        if mask is not None:
            capacity = mask.shape[1] + SPARE_TOKENS
            self.padding_mask = torch.ones((mask.shape[0], capacity), dtype=torch.bool, device=device)
            self.padding_mask[:, : mask.shape[1]] = mask
            self.padding_mask_here = self.padding_mask.cpu()
        self._block_masks: dict[tuple[int, int], torch.Tensor] = {}

    def block_mask(self, block_size: int, blocks: int) -> torch.Tensor:
        """Blocks with at least one token that is no padding, (batch, blocks) of bool."""
        key = (block_size, blocks)
        if key not in self._block_masks:
            mask = self.padding_mask
            if mask is None:
                raise ValueError("no token of this step is padding")
            whole, known = mask.new_ones((len(mask), blocks * block_size)), min(blocks * block_size, mask.shape[1])
            whole[:, :known] = mask[:, :known]
            self._block_masks[key] = whole.unflatten(1, (blocks, block_size)).any(-1)
        return self._block_masks[key]

    def set(self, tokens: int, blocks: int, shares: list[float]) -> None:
        """Set the numbers of the next step, in stream order."""
        self.length.fill_(tokens)
        self.blocks.fill_(blocks)
        if shares != self._shares:
            here = torch.tensor(shares, dtype=torch.float32, device="cpu", pin_memory=self.shares.is_cuda)
            self.shares.copy_(here, non_blocking=True)
            self._shares = shares


class CudaGraph:
    """A CUDA graph, captured on ``stream``."""

    def __init__(self, device: torch.device, stream: Any = None):
        self.device, self._stream = device, stream
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], Any], join: Callable[[], None]) -> Any:
        """Capture what ``run`` and then ``join`` launch. Tensors that ``run`` returns are filled by ``replay``."""
        pool, before = torch.cuda.graph_pool_handle(), torch.cuda.current_stream(self.device)
        # Relaxed, since kernels may be loaded at their first launch, which is here.
        how = {"pool": pool, "stream": self._stream, "capture_error_mode": "relaxed"}
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(self._graph, **how):
                try:
                    result = run()
                finally:
                    join()
        except BaseException:
            # torch before 2.12 does not clean up after a failed capture.
            torch.cuda.set_stream(before)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, pool)
            raise
        return result

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()


def can_capture(device: torch.device) -> bool:
    """Whether steps on this device can be captured."""
    return device.type == "cuda"


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

    def holds(self, step: Step, key: Any) -> bool:
        """Whether a replay computes this step."""
        if self.key != key:
            return False
        mask = self.clock.padding_mask
        return mask is None or self.tokens + 1 == step.tokens <= mask.shape[1]


@dataclass
class Capture:
    """State of one cache: how many of its steps could be captured, and the captured one."""

    steps: int = 0
    graph: Captured | None = None


class _Held(NamedTuple):
    """The layers of a step's cache that hold tokens, with their methods and stores; see ``Method.capture_key``."""

    layers: list[ScoutLayer]
    methods: list[Method]
    kvs: list[TwoTierKV]

    @classmethod
    def of(cls, step: Step) -> _Held:
        layers = step.cache.scout_layers
        methods = [layer.method for layer in layers if layer.method is not None]
        return cls(layers, methods, cast("list[TwoTierKV]", [method.kv for method in methods]))


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
        held = None if self._failed else _Held.of(step)
        key = None if held is None else self._key(step, held, given)
        if held is None or key is None:
            return self._forward(*args, **kwargs)
        capture = self._captures.setdefault(step.cache, Capture())
        capture.steps += 1
        if capture.steps <= WARM_STEPS:
            return self._forward(*args, **kwargs)
        try:
            captured = capture.graph
            if captured is not None and captured.holds(step, key):
                return self._run(step, held, capture, captured, given)
            return self._finish(step, held, self._capture(step, held, capture, given, key))
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

    def _key(self, step: Step, held: _Held, given: dict[str, Any]) -> Any:
        """The assumptions of a captured step, or None if this step cannot be captured."""
        usual = step.queries == 1 and step.monitor is None and len(held.methods) == len(step.cache.layers)
        usual = usual and not torch.is_grad_enabled()
        known = (*INPUTS, CACHE, "past_key_values", "attention_mask", "use_cache", "return_dict", "cache_position")
        usual = usual and "position_ids" in self._names and given.get("position_ids") is not None
        usual = usual and not self._asks_the_device()
        if not usual or any(value is not None for name, value in given.items() if name not in known):
            return None
        layers = tuple(method.capture_key(step) for method in held.methods)
        if None in layers or len({kv.host.blocks for kv in held.kvs}) != 1:
            return None
        devices = {kv.device for kv in held.kvs}
        # Embeddings on another device would run during capture only, not in replays.
        devices |= {given[name].device for name in INPUTS if given.get(name) is not None}
        if given_cache(given) is not step.cache or len(devices) != 1 or not can_capture(*devices):
            return None
        inputs = tuple((name, given[name].shape) for name in INPUTS if given.get(name) is not None)
        return inputs, step.mask is None, torch.is_inference_mode_enabled(), layers

    def _asks_the_device(self) -> bool:
        """Whether the model synchronises with the device in a step, or returns more than its last hidden state."""
        config = self._config
        ropes = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        kinds = [ropes, *(part for part in ropes.values() if isinstance(part, dict))]
        grows = any(part.get("rope_type", part.get("type")) in ("dynamic", "longrope") for part in kinds)
        return grows or any(getattr(config, f"output_{what}", False) for what in ("hidden_states", "attentions"))

    def _capture(self, step: Step, held: _Held, capture: Capture, given: dict[str, Any], key: Any) -> Captured:
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
            self._expect(step, held, clock)
            step.clock = clock
            step.links.forget_captured(device)
            output = graph.capture(lambda: self._forward(**fixed, **inputs), lambda: step.links.join_captured(device))
        except BaseException as error:
            self._abort(step, held, capture)
            raise _CaptureError from error
        finally:
            step.clock = None
        # Without the cache, which would keep itself alive through its capture.
        kept = {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}
        capture.graph = Captured(graph, clock, key, inputs, type(output), kept, step.tokens)
        return capture.graph

    def _run(self, step: Step, held: _Held, capture: Capture, captured: Captured, given: dict[str, Any]) -> Any:
        try:
            for name, fixed in captured.inputs.items():
                fixed.copy_(given[name], non_blocking=True)
            self._expect(step, held, captured.clock)
        except BaseException:
            self._abort(step, held, capture)
            raise
        return self._finish(step, held, captured)

    def _expect(self, step: Step, held: _Held, clock: Clock) -> None:
        shares = [method.before_replay(step, clock.padding_mask_here) for method in held.methods]
        clock.set(step.tokens, held.kvs[0].host.blocks, shares)

    def _finish(self, step: Step, held: _Held, captured: Captured) -> Any:
        captured.graph.replay()
        captured.tokens = step.tokens
        for layer, method in zip(held.layers, held.methods):
            layer.incoming = None
            method.after_replay(step)
        # The next replay overwrites these tensors: the caller gets copies.
        output = {name: value.clone() for name, value in captured.output.items()}
        return captured.kind(**output, **{CACHE: step.cache})

    def _abort(self, step: Step, held: _Held, capture: Capture) -> None:
        """Cancel the step that the CPU expects, so that nothing waits for it."""
        capture.graph = None
        for device in {kv.device for kv in held.kvs}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the step before may still be running
        for layer, method in zip(held.layers, held.methods):
            layer.incoming = None
            method.abort_replay()
