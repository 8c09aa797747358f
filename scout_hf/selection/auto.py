"""The choice of a digest for ``digest="auto"``."""

from __future__ import annotations

import torch

from scout_hf.config import ScoutConfig
from scout_hf.errors import ConfigError
from scout_hf.kernels.cpu.library import MAX_HEAD_DIM, load_library
from scout_hf.kernels.device import MOST_CHANNELS, find_kernels_for
from scout_hf.selection.digest import digest_names, find_digest

AUTO = "auto"


def digest_for(config: ScoutConfig, keys: torch.Tensor) -> str:
    """The name of the digest for a layer.

    ``"auto"`` is the sign code of two bits, or of one for large head sizes, and min/max where neither native code nor a
    GPU kernel scores sign codes; with ``mass``, it is a sign code there too.

    Parameters
    ----------
    config : ScoutConfig
    keys : Tensor (batch, kv_heads, tokens, head_dim)
        Keys of the layer, for head size, dtype and device.

    Returns
    -------
    str

    Raises
    ------
    ConfigError
        If the named digest is unknown, cannot encode keys of this head size, or estimates no mass where ``mass`` is
        set.

    Examples
    --------
    >>> import torch
    >>> from scout_hf import ScoutConfig
    >>> from scout_hf.selection import digest_for
    >>> digest_for(ScoutConfig(digest="minmax"), torch.zeros(1, 2, 4, 64))
    'minmax'
    """
    check_digest(config.digest, keys.shape[-1], config.mass)
    if config.digest != AUTO:
        return config.digest
    bits = _most_bits(config, keys) // keys.shape[-1] if find_digest("sign").serves(keys.shape[-1]) else 0
    # With mass a slow estimate is better than none.
    return "sign2" if bits >= 2 else "sign" if bits else "minmax" if config.mass is None else "sign2"


def _most_bits(config: ScoutConfig, keys: torch.Tensor) -> int:
    """The most bits per token that are scored fast; 0 if none are."""
    if find_kernels_for(config.gpu_kernels, keys) is not None:
        return MOST_CHANNELS
    library = load_library() if keys.device.type == "cpu" else None
    # Without byte shuffles (SIMD) a sign code takes thirty times as long as min/max.
    return MAX_HEAD_DIM if library is not None and library.isa != "base" else 0


def check_digest(name: str, head_dim: int | None, mass: float | None = None) -> None:
    """Check that a digest is known, can encode keys of a head size, and estimates mass if that is asked for.

    Parameters
    ----------
    name : str
        ``ScoutConfig.digest``.
    head_dim : int or None
        None if it is not known yet.
    mass : float or None
        ``ScoutConfig.mass``.

    Raises
    ------
    ConfigError
        If the digest is unknown, cannot encode such keys, or estimates no mass though ``mass`` is set.

    Examples
    --------
    >>> from scout_hf.selection import check_digest
    >>> check_digest("sign", 128)
    """
    if name != AUTO and not find_digest(name).serves(head_dim or 8):
        raise ConfigError(f"digest={name!r} cannot encode this model's head_dim={head_dim}; try digest='minmax'")
    if mass is None:
        return
    if name != AUTO and not find_digest(name).per_head:
        able = [repr(known) for known in digest_names() if known != AUTO and find_digest(known).per_head]
        raise ConfigError(
            f"mass={mass!r} is not possible with digest={name!r}, which estimates no attention mass; digests that do "
            f"are {', '.join(able)}; try digest='auto', or leave mass out"
        )
    if name == AUTO and not find_digest("sign").serves(head_dim or 8):
        raise ConfigError(
            f"mass={mass!r} is not possible with this model's head_dim={head_dim}: the digests 'sign' and 'sign2', "
            "which estimate attention mass, encode multiples of 8; leave mass out, and set a budget"
        )
