"""The seam for attention over host pages: one interface, the best implementation this machine has.

``auto`` takes the first that works here; a name forces one.
"""

from __future__ import annotations

from scout_hf.errors import ConfigError
from scout_hf.kernels.cpu.backend import Attended, BlockLists, CpuBackend
from scout_hf.kernels.cpu.ipex_backend import IpexBackend, load_op
from scout_hf.kernels.cpu.library import load_library
from scout_hf.kernels.cpu.native_backend import NativeBackend
from scout_hf.kernels.cpu.protocols import PagedStore, Ticket
from scout_hf.kernels.cpu.torch_backend import TorchBackend
from scout_hf.registry import Registry

__all__ = [
    "Attended",
    "BlockLists",
    "CpuBackend",
    "PagedStore",
    "Ticket",
    "backend_names",
    "find_backend",
    "make_backend",
]

_BACKENDS: Registry[CpuBackend] = Registry("cpu_backend", also=("auto",))
for _backend in (NativeBackend, TorchBackend, IpexBackend):
    _BACKENDS.register(_backend, CpuBackend)


def backend_names() -> tuple[str, ...]:
    """Names that ``ScoutConfig(cpu_backend=...)`` takes."""
    return _BACKENDS.names()


def find_backend(name: str = "auto") -> type[CpuBackend]:
    """The backend of that name.

    Raises
    ------
    ConfigError
        If there is none of that name, or the one asked for cannot work here.
    """
    if name == "auto":
        return NativeBackend if load_library() is not None else TorchBackend
    found = _BACKENDS.find(name)
    if found is NativeBackend and load_library() is None:
        raise ConfigError(
            "cpu_backend='native' is not possible: scout_hf was installed without its native library; reinstall it "
            "with g++ or clang at hand, or leave cpu_backend='auto'"
        )
    if found is IpexBackend:
        load_op()
    return found


def make_backend(name: str = "auto", threads: int | None = None) -> CpuBackend:
    """A backend of that name; ``threads`` for work in the background. Raises like :func:`find_backend`."""
    return find_backend(name)(threads)
