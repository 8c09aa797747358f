"""The forwards that take the place of a norm's, a gated feed-forward block's and an attention module's own.

They run in decode steps of a patched model, without gradients. Elsewhere, for tensors that no kernel takes, and where
somebody has replaced it since, a module runs what its class says.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from scout_hf.fused import stock
from scout_hf.kernels.device import KERNEL_DTYPES, MOST_NORMALISED, find_kernels
from scout_hf.patches.own_forward import OwnForward
from scout_hf.patches.quiet import is_bare
from scout_hf.step import in_fused_step

PLAIN = (torch.Tensor, nn.Parameter)


class Fused(OwnForward):
    """A module's ``forward`` that makes fewer launches where it can.

    Parameters
    ----------
    module : Module
        Whose class has a known ``forward``.
    gpu_kernels : str
        As in :class:`scout_hf.ScoutConfig`.
    """

    def __init__(self, module: nn.Module, gpu_kernels: str):
        self._module, self._setting = module, gpu_kernels
        self._known = type(module).forward
        self._kernels: tuple[torch.device, ModuleType | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kernels": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward: Any = type(self._module).forward
        if forward is not self._known or not in_fused_step():
            return forward(self._module, *args, **kwargs)
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _kernels_for(self, *tensors: torch.Tensor) -> ModuleType | None:
        """The kernels, if they take these tensors together."""
        dtype, device = tensors[0].dtype, tensors[0].device
        if dtype not in KERNEL_DTYPES or torch.is_autocast_enabled(device.type):
            return None
        for one in tensors:
            alike = type(one) in PLAIN and one.dtype == dtype and one.device == device
            if not alike or one.stride(-1) != 1:
                return None
        if self._kernels is None or self._kernels[0] != device:
            self._kernels = device, find_kernels(self._setting, device)
        return self._kernels[1]


class FusedNorm(Fused):
    """Of an RMS norm with its eps under this name; ``shifted`` as in ``rms_norm``."""

    def __init__(self, module: nn.Module, gpu_kernels: str, eps: str, shifted: bool):
        super().__init__(module, gpu_kernels)
        self._eps, self._shifted = eps, shifted

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        module: Any = self._module
        weight = module.weight
        # One token per row of the batch, with its heads behind or before it.
        fits = x.dim() in (3, 4) and 1 in x.shape[1:-1]
        fits = fits and weight.shape == x.shape[-1:] and weight.shape[0] <= MOST_NORMALISED
        kernels = self._kernels_for(x, weight) if fits else None
        if kernels is None:
            return self._known(module, x)
        rows = x if x.dim() == 3 else x.flatten(1, 2)
        return kernels.rms_norm(rows, weight, getattr(module, self._eps), self._shifted).view(x.shape)


class FusedGate(Fused):
    """Of a feed-forward block whose gate opens by SiLU. Its projections are called as before, with their hooks."""

    def __init__(self, module: Any, gpu_kernels: str):
        super().__init__(module, gpu_kernels)
        self._opens = module.act_fn

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        module: Any = self._module
        if module.act_fn is not self._opens or not is_bare(self._opens) or torch_module._has_any_global_hook():
            return self._known(module, x)
        gate, up = module.gate_proj(x), module.up_proj(x)
        fits = gate.shape == up.shape and gate.is_contiguous() and up.is_contiguous()
        kernels = self._kernels_for(gate, up) if fits else None
        return module.down_proj(module.act_fn(gate) * up if kernels is None else kernels.silu_product(gate, up))


class FusedRotation(Fused):
    """Of an attention module: its class's code, in which the rotary function is another one."""

    def __init__(self, module: nn.Module, gpu_kernels: str):
        super().__init__(module, gpu_kernels)
        self._before = rotary_of(self._known)
        # Found and made when first needed: neither can be pickled.
        self._rotating: FunctionType | None = None
        self._forward: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_rotating": None, "_forward": None}

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_stock():
            return self._known(self._module, *args, **kwargs)
        if self._forward is None:
            self._forward = with_rotary(self._known, self.rotary)
        return self._forward(self._module, *args, **kwargs)

    def _is_stock(self) -> bool:
        """Whether the rotary function of the module's file is still the known one."""
        if self._rotating is None:
            self._rotating = rotating(self._known)
        found = None if self._rotating is None else self._rotating.__globals__.get(stock.ROTARY)
        return found is self._before and (not isinstance(found, nn.Module) or is_bare(found))

    def rotary(self, q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """``apply_rotary_pos_emb`` of the module's file."""
        kernels = None
        if in_fused_step() and self._is_stock():
            one_token = q.dim() == 4 and q.shape[2] == 1 and unsqueeze_dim == 1
            turns = cos.shape == sin.shape in ((1, 1, q.shape[-1]), (q.shape[0], 1, q.shape[-1]))
            alike = k.shape[::2] == q.shape[::2] and k.shape[-1] == q.shape[-1] and not q.shape[-1] % 2
            kernels = self._kernels_for(q, k, cos, sin) if one_token and turns and alike else None
        turn = rotary_of(self._known) if kernels is None else kernels.rotate
        return turn(q, k, cos, sin, unsqueeze_dim) if kernels is None else turn(q, k, cos, sin)


def rotary_of(forward: Any) -> Any:
    """What a function, or the one that it wraps, calls as rotary function; None if `with_rotary` cannot change that."""
    inner = rotating(forward)
    return None if inner is None else inner.__globals__.get(stock.ROTARY)


def rotating(forward: Any) -> FunctionType | None:
    """The function, or the one that it wraps, that calls a rotary function; None as above."""
    while hasattr(forward, "__wrapped__"):
        inner, cells = forward.__wrapped__, getattr(forward, "__closure__", None) or ()
        if not isinstance(forward, FunctionType) or all(cell.cell_contents is not inner for cell in cells):
            return None
        forward = inner
    calls = isinstance(forward, FunctionType) and stock.ROTARY in forward.__code__.co_names
    return forward if calls else None


def with_rotary(function: Any, rotary: Callable[..., Any]) -> Any:
    """The same function with another rotary function, within functions that it wraps too."""
    names, cells = function.__globals__, function.__closure__
    if not hasattr(function, "__wrapped__"):
        names = {**names, stock.ROTARY: rotary}
    else:
        inner = function.__wrapped__
        made = CellType(with_rotary(inner, rotary))
        cells = tuple(made if cell.cell_contents is inner else cell for cell in cells)
    again = FunctionType(function.__code__, names, function.__name__, function.__defaults__, cells)
    again.__kwdefaults__ = function.__kwdefaults__
    return again
