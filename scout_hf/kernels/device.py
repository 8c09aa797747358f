"""The choice of device kernels: Triton if it is installed and runs on the device."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from scout_hf.errors import ConfigError

OLDEST_CAPABILITY = (8, 0)
KERNEL_DTYPES, MOST_CHANNELS = (torch.bfloat16, torch.float16, torch.float32), 256
MOST_NORMALISED = 16384  # channels of a row


def find_kernels(setting: str, device: torch.device) -> ModuleType | None:
    """The module of Triton kernels, or None to use torch.

    Parameters
    ----------
    setting : {"auto", "torch", "triton"}
        ``ScoutConfig.gpu_kernels``. ``"auto"``: Triton, if installed, on a GPU of AMD or of compute capability 8.0 or
        newer.
    device : torch.device
        Device of the tensors.

    Returns
    -------
    module or None

    Raises
    ------
    ConfigError
        For ``"triton"`` where it cannot run.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.kernels import find_kernels
    >>> find_kernels("auto", torch.device("cpu")) is None
    True
    """
    if setting == "torch" or (setting == "auto" and not _by_default(device)):
        return None
    kernels = _load()
    if kernels is not None and (_is_recent(device) if device.type == "cuda" else kernels.INTERPRETED):
        return kernels
    if setting == "auto":
        return None
    why = "triton cannot be imported" if kernels is None else f"it does not run on {device}"
    raise ConfigError(
        f"gpu_kernels='triton' is not possible: {why}; allowed are GPUs of compute capability 8.0 or newer with triton "
        "installed (on a CPU its interpreter, TRITON_INTERPRET=1); leave gpu_kernels='auto'"
    )


def find_kernels_for(setting: str, keys: torch.Tensor) -> ModuleType | None:
    """As :func:`find_kernels`, but None for keys of a dtype or head size that no kernel serves.

    Parameters
    ----------
    setting : {"auto", "torch", "triton"}
    keys : Tensor (..., head_dim)

    Returns
    -------
    module or None

    Examples
    --------
    >>> import torch
    >>> from scout_hf.kernels.device import find_kernels_for
    >>> find_kernels_for("auto", torch.zeros(1, 2, 4, 64)) is None
    True
    """
    served = keys.dtype in KERNEL_DTYPES and keys.shape[-1] <= MOST_CHANNELS
    return find_kernels(setting, keys.device) if served else None


def _by_default(device: torch.device) -> bool:
    return device.type == "cuda"


@functools.lru_cache
def _is_recent(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY


@functools.lru_cache
def _load() -> ModuleType | None:
    try:
        return importlib.import_module("scout_hf.kernels.triton")
    except ImportError:
        return None
