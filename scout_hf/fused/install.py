"""Which modules of a decoder get another ``forward``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from scout_hf.changes import Attribute
from scout_hf.config import ScoutConfig
from scout_hf.errors import ConfigError
from scout_hf.fused import stock
from scout_hf.fused.forwards import Fused, FusedGate, FusedNorm, FusedRotation, rotary_of
from scout_hf.kernels.device import find_kernels
from scout_hf.patches.base import weight_device


def changes_of_fused(decoder: nn.Module, config: ScoutConfig) -> Iterator[Attribute]:
    """The changes to single modules of a decoder that lie on a GPU; none with ``fused=False``.

    Raises
    ------
    ConfigError
        With ``fused=True``, if the kernels do not run where the decoder is.
    """
    cpu = torch.device("cpu")
    here = weight_device(decoder, default=cpu)
    if config.fused is True and find_kernels(config.gpu_kernels, here) is None:
        raise ConfigError(
            f"fused=True is not possible: its kernels need Triton and a GPU, the model is on {here} and gpu_kernels is "
            f"{config.gpu_kernels!r}; leave fused='auto'"
        )
    if config.fused is False:
        return
    for module in decoder.modules():
        if "forward" in module.__dict__:
            continue  # somebody's own
        forward, device = fused_forward(module, config.gpu_kernels), weight_device(module, default=cpu)
        if forward is None or device.type == "meta" or find_kernels(config.gpu_kernels, device) is None:
            continue
        yield Attribute(module, "forward", forward, keep_others=True)


def fused_forward(module: Any, gpu_kernels: str) -> Fused | None:
    """What can take the place of the module's ``forward``; None if its class is not known."""
    kind = type(module)
    if stock.is_same(kind.forward, stock.norm_of_llama):
        return FusedNorm(module, gpu_kernels, "variance_epsilon", shifted=False)
    if stock.is_same(kind.forward, stock.norm_of_gemma) and stock.is_same(kind._norm, stock.scaled_of_gemma):
        return FusedNorm(module, gpu_kernels, "eps", shifted=True)
    if stock.is_same(kind.forward, stock.feed_forward_of_llama):
        opens = type(module.act_fn)
        known = opens is nn.SiLU or stock.is_same(opens.forward, stock.silu_of_transformers)
        return FusedGate(module, gpu_kernels) if known else None
    rotary = stock.unwrapped_function(rotary_of(kind.forward))
    return FusedRotation(module, gpu_kernels) if stock.is_same(rotary, stock.apply_rotary_pos_emb) else None
