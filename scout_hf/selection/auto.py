"""Which digest a layer uses when none is named."""

from __future__ import annotations

import torch

from scout_hf.config import ScoutConfig
from scout_hf.errors import ConfigError
from scout_hf.kernels.cpu.library import load_library
from scout_hf.selection.digest import find_digest

AUTO = "auto"
# From this share of the context on, min/max finds what matters as well, in a fraction of the time.
EASY_SHARE = 0.5


def digest_for(config: ScoutConfig, keys: torch.Tensor) -> str:
    """The name of the digest for a layer with such keys, (batch, kv_heads, tokens, head_dim).

    ``auto`` is the sign code where native code scores it and the budget is small enough to need it, else min/max.
    ConfigError if a digest was named that cannot code such keys.
    """
    if config.digest != AUTO:
        check_digest(config.digest, keys.shape[-1])
        return config.digest
    easy = isinstance(config.budget, float) and config.budget >= EASY_SHARE
    library = load_library() if keys.device.type == "cpu" else None
    # Without table shuffles a sign code takes thirty times as long as min/max.
    native = library is not None and library.isa != "base"
    return "sign" if native and not easy and find_digest("sign").serves(keys.shape[-1]) else "minmax"


def check_digest(name: str, head_dim: int | None) -> None:
    """ConfigError unless there is such a digest and it can code keys of that size; None where it is not known yet."""
    if name != AUTO and not find_digest(name).serves(head_dim or 8):
        raise ConfigError(f"digest={name!r} cannot code this model's head size of {head_dim}; try digest='minmax'")
