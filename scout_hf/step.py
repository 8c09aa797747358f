"""One forward pass of a patched model: its cache, its padding mask, and what its layers share."""

from __future__ import annotations

import enum
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from types import FrameType

    from scout_hf.auto_budget import AutoBudget, Rates
    from scout_hf.cache import ScoutCache
    from scout_hf.counters import Counters
    from scout_hf.graph_clock import Clock
    from scout_hf.kernels.cpu import CpuBackend
    from scout_hf.kernels.cpu.workers import Workers
    from scout_hf.monitor import Monitor
    from scout_hf.selection.own_choice import OwnChoice
    from scout_hf.stores.streams import Links

_ACTIVE = threading.local()


def active_step() -> Step | None:
    """The forward pass with a ScoutCache that runs in the calling thread, or None."""
    return getattr(_ACTIVE, "step", None)


def in_fused_step() -> bool:
    """Whether the calling thread is in a decode step with a ScoutCache whose small operations may be fused."""
    if torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled():
        return False
    step: Step | None = getattr(_ACTIVE, "step", None)
    return step is not None and 1 == step.queries < step.tokens and step.cache.scout_config.fused is not False


def set_active_step(step: Step | None) -> None:
    """Make ``step`` the calling thread's forward pass; None ends it."""
    _ACTIVE.step = step


class Role(enum.Enum):
    """What a pass is for: ``DRAFT`` steps are sparse and taken back, an exact ``CHECK`` of them takes their place."""

    ORDINARY = "ordinary"
    DRAFT = "draft"
    CHECK = "check"


class Inputs(NamedTuple):
    """Inputs of a layer: hidden states (batch, queries, hidden_size), and their positions (1 or batch, queries).

    Positions with several axes, as for images, are (1 or batch, queries, axes).
    """

    hidden: torch.Tensor
    position_ids: torch.Tensor | None


def decoder_positions(position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """A decoder's positions, (batch, queries) or, where they have several axes, (batch, queries, axes).

    Decoders of transformers take (3, batch, queries), or (4, batch, queries) with text positions for masks first.
    """
    return position_ids if position_ids is None or position_ids.dim() != 3 else position_ids[-3:].movedim(0, -1)


def makes_nothing(layer: int, hidden: torch.Tensor, position_ids: torch.Tensor | None) -> None:
    """``Step.keys_values`` of a pass whose layers cannot compute keys and values from inputs."""


@dataclass
class Step:
    """State of one forward pass, shared by its layers.

    Parameters
    ----------
    cache : ScoutCache
        The cache of this pass.
    queries : int
        New tokens per row; 1 is a decode step.
    tokens : int
        Tokens per row after this pass, padding included.
    mask, mask_here : Tensor (batch, tokens) of bool, or None
        Padding mask, False for padding, and the same on the CPU; None without padding.
    backend, movers, links, counters
        CPU attention, threads that move recalled blocks or wait for a device, side streams of devices, and the counters
        of the handle.
    root : Module
        The module whose call opened this pass.
    marks : list
        The state of the cache's layers before this pass, for a rollback.
    monitor, watched
        The fidelity monitor or None, and the KV heads to sample in this step, by layer.
    inputs : dict of Inputs by layer, or None
        Inputs of the layers that have begun; None if the method needs none.
    positions : Tensor (1 or batch, queries, axes), or None
        Positions of image tokens, for a method that needs inputs.
    keys_values : callable
        ``(layer, hidden, position_ids)`` to the keys and values that the layer computes from such inputs, (batch,
        kv_heads, tokens, head_dim) each; None while its weights are not on a device.
    plain_masks : list
        Masks over queries and keys of this pass that are just causal and padding.
    allowed : Tensor (1 or batch, 1, 1 or queries, tokens) of bool, or None
        For the current layer, in a pass of several tokens over cached ones: which tokens each query may attend to, if
        that is not causal.
    fuses_more : bool
        Whether the current layer fuses what it attended with more (attention sinks), which takes it in float32.
    shared : dict
        What layers of this pass share.
    choice : OwnChoice or None
        For the current layer: what the model chose to attend to, if it does that itself.
    auto : AutoBudget or None
        Measures this decode step, with ``budget="auto"``.
    rates : Rates or None
        What such steps took before.
    attends_all : bool
        Whether layers attend to all tokens in this decode step, whatever the budget is.
    as_several : bool
        Whether they do that as in passes of several tokens, because ``attend`` of the method cannot.
    drafts : bool
        Whether drafts may follow, as with ``patch(draft=True)``.
    role : Role
    depth : int
        Nested modules of this pass that are still running.
    compares : bool
        Whether layers compare predicted and real query in this step, because most steps are replayed and cannot.
    clock : Clock or None
        Numbers of a step that is being captured; see :mod:`scout_hf.graph`.
    frame : frame or None
        Frame of the call that opened this pass; shows whether it is still running.
    """

    cache: ScoutCache
    queries: int
    tokens: int
    mask: torch.Tensor | None
    backend: CpuBackend
    movers: Workers
    links: Links
    counters: Counters
    root: torch.nn.Module
    marks: list[Any]
    mask_here: torch.Tensor | None = None
    monitor: Monitor | None = None
    watched: dict[int, tuple[int, ...]] | None = None
    inputs: dict[int, Inputs] | None = None
    positions: torch.Tensor | None = None
    keys_values: Callable[..., tuple[torch.Tensor, torch.Tensor] | None] = makes_nothing
    plain_masks: list[Any] = field(default_factory=list)
    allowed: torch.Tensor | None = None
    choice: OwnChoice | None = None
    auto: AutoBudget | None = None
    rates: Rates | None = None
    attends_all: bool = False
    as_several: bool = False
    drafts: bool = False
    role: Role = Role.ORDINARY
    fuses_more: bool = False
    shared: dict[Any, Any] = field(default_factory=dict)
    depth: int = 1
    frame: FrameType | None = None
    compares: bool = False
    clock: Clock | None = None
    _masks: dict[Any, torch.Tensor] = field(default_factory=dict)

    def method_behind(self, layer_idx: int) -> Any:
        """The method of the next layer that has tokens and a method; None behind the last."""
        following = (getattr(layer, "method", None) for layer in self.cache.layers[layer_idx + 1 :])
        return next((method for method in following if method is not None), None)

    def is_running_here(self) -> bool:
        """Whether the calling thread is inside this pass."""
        return self.frame is not None and self._is_under(sys._getframe(1))

    def is_running(self) -> bool:
        """Whether any thread is inside this pass; False if it was interrupted."""
        if self.frame is None:
            return False
        return self._is_under(sys._getframe(1)) or any(map(self._is_under, sys._current_frames().values()))

    def _is_under(self, frame: FrameType | None) -> bool:
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

    def abort(self) -> None:
        """End a pass that failed, and roll the cache back."""
        self.cache.rollback(self.marks)

    @property
    def real_mask(self) -> torch.Tensor:
        """``mask``; ValueError without padding."""
        if self.mask is None:
            raise ValueError("this pass has no padding mask: check `step.mask is None` first")
        return self.mask

    def padding(self, device: torch.device) -> torch.Tensor:
        """``mask`` on the device of a layer."""
        if device not in self._masks:
            mask = self.real_mask if self.mask_here is None or device.type != "cpu" else self.mask_here
            if device.type == "cuda" and mask.device.type == "cpu":
                mask = mask.pin_memory()  # copies from pageable memory would synchronise
            self._masks[device] = mask.to(device, non_blocking=True)
        return self._masks[device]

    def length(self, device: torch.device) -> torch.Tensor:
        """``tokens`` on the device of a layer, (1,) of int32."""
        key = ("length", device)
        if key not in self._masks:
            self._masks[key] = torch.full((1,), self.tokens, dtype=torch.int32, device=device)
        return self._masks[key]

    def block_tokens(self, block_size: int, device: torch.device) -> torch.Tensor:
        """Number of tokens in each block that are no padding, (batch, blocks) of int64."""
        key = ("block tokens", block_size, device)
        if key not in self._masks:
            self._masks[key] = self.token_mask(block_size, device).sum(-1)
        return self._masks[key]

    def block_mask(self, block_size: int, device: torch.device) -> torch.Tensor:
        """Blocks with at least one token that is no padding, (batch, blocks) of bool."""
        key = ("blocks", block_size, device)
        if key not in self._masks:
            self._masks[key] = self.token_mask(block_size, device).any(-1)
        return self._masks[key]

    def token_mask(self, block_size: int, device: torch.device) -> torch.Tensor:
        """``mask`` in blocks, (batch, blocks, block_size); the last block is filled up with False."""
        key = (block_size, device)
        if key not in self._masks:
            batch, tokens = self.real_mask.shape
            padded = torch.nn.functional.pad(self.padding(device), (0, -tokens % block_size))
            self._masks[key] = padded.view(batch, -1, block_size)
        return self._masks[key]

    def behind(self, first: int, device: torch.device) -> float | torch.Tensor:
        """Tokens from ``first`` on that are no padding, mean over the rows; a number without padding."""
        if self.mask is None:
            return float(self.tokens - first)
        key = ("behind", first, device)
        if key not in self._masks:
            real = self.padding(device)[:, first:]
            self._masks[key] = real.sum(dtype=torch.float32) / len(real)
        return self._masks[key]

    def context(self) -> float | torch.Tensor:
        """Tokens per row that are no padding, mean over the rows; a Python number without padding."""
        return self.tokens if self.mask is None else self.row_tokens().float().mean()

    def row_tokens(self) -> torch.Tensor:
        """Number of tokens in each row that are no padding, (batch,), on the CPU if the mask is known there."""
        return (self.real_mask if self.mask_here is None else self.mask_here).sum(-1)
