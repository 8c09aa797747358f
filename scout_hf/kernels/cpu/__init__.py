"""The seam for attention over host pages: one interface, the best implementation this machine has.

``auto`` takes the first that works here; a name forces one.
"""

from __future__ import annotations

from scout_hf.kernels.cpu.backend import CpuBackend
from scout_hf.kernels.cpu.torch_backend import TorchBackend
from scout_hf.registry import Registry

_BACKENDS: Registry[CpuBackend] = Registry("cpu_backend", also=("auto",))
_BACKENDS.register(TorchBackend, CpuBackend)


def backend_names() -> tuple[str, ...]:
    """Names that ``ScoutConfig(cpu_backend=...)`` takes."""
    return _BACKENDS.names()


def make_backend(name: str = "auto") -> CpuBackend:
    """The backend of that name, or ConfigError with the names there are."""
    return _BACKENDS.find("torch" if name == "auto" else name)()
