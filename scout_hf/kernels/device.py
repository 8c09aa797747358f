"""The seam for kernels on the device: Triton where it is there and the tensors are where it can run."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from scout_hf.errors import ConfigError

OLDEST_CAPABILITY = (8, 0)
KERNEL_DTYPES, MOST_CHANNELS = (torch.bfloat16, torch.float16, torch.float32), 256


def find_kernels(wanted: str, device: torch.device) -> ModuleType | None:
    """The package of Triton kernels, or None where torch does the work.

    Parameters
    ----------
    wanted : {"auto", "torch", "triton"}
        ``auto``: Triton on a GPU of compute capability 8.0 or newer (or of AMD) where it can be imported.
    device : torch.device
        Of the tensors.

    Raises
    ------
    ConfigError
        If Triton is asked for and cannot run here.
    """
    if wanted == "torch" or (wanted == "auto" and not _by_default(device)):
        return None
    kernels = _load()
    if kernels is not None and (_is_recent(device) if device.type == "cuda" else kernels.INTERPRETED):
        return kernels
    if wanted == "auto":
        return None
    why = "triton cannot be imported" if kernels is None else f"it does not run on {device}"
    raise ConfigError(
        f"gpu_kernels='triton' is not possible: {why}; allowed are GPUs of compute capability 8.0 or newer with triton "
        "installed (on a CPU its interpreter, TRITON_INTERPRET=1); leave gpu_kernels='auto'"
    )


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
