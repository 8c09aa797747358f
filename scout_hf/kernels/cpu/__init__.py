"""CPU attention over host pages: one interface, several backends.

``auto`` takes the native backend if its library is installed, else torch.
"""

from __future__ import annotations

from scout_hf.errors import ConfigError
from scout_hf.kernels.cpu.backend import Attended, BlockLists, ByMass, Coarse, CpuBackend
from scout_hf.kernels.cpu.ipex_backend import IpexBackend, load_op
from scout_hf.kernels.cpu.library import load_library
from scout_hf.kernels.cpu.native_backend import NativeBackend
from scout_hf.kernels.cpu.protocols import PagedStore, StepJob, StepJobs, StepSums, StepTotals, Ticket
from scout_hf.kernels.cpu.torch_backend import TorchBackend
from scout_hf.registry import Registry

__all__ = [
    "Attended",
    "BlockLists",
    "ByMass",
    "Coarse",
    "CpuBackend",
    "PagedStore",
    "StepJob",
    "StepJobs",
    "StepSums",
    "StepTotals",
    "Ticket",
    "backend_names",
    "find_backend",
    "make_backend",
    "register_backend",
]

_BACKENDS: Registry[CpuBackend] = Registry("cpu_backend", also=("auto",))
for _backend in (NativeBackend, TorchBackend, IpexBackend):
    _BACKENDS.register(_backend, CpuBackend)


def register_backend(backend: type[CpuBackend]) -> type[CpuBackend]:
    """Register a CPU backend for ``ScoutConfig(cpu_backend=name)``; usable as a class decorator.

    Parameters
    ----------
    backend : type of CpuBackend

    Returns
    -------
    type of CpuBackend
        The same class.

    Raises
    ------
    ConfigError
        If its ``name`` is empty or taken, or it is not a complete subclass of :class:`CpuBackend`.

    Examples
    --------
    >>> from scout_hf.kernels.cpu import backend_names, register_backend
    >>> from scout_hf.kernels.cpu.torch_backend import TorchBackend
    >>> @register_backend
    ... class MyBackend(TorchBackend):
    ...     name = "mine"
    >>> "mine" in backend_names()
    True
    """
    return _BACKENDS.register(backend, CpuBackend)


def backend_names() -> tuple[str, ...]:
    """Allowed values of ``ScoutConfig(cpu_backend=...)``.

    Examples
    --------
    >>> from scout_hf.kernels.cpu import backend_names
    >>> backend_names()
    ('auto', 'ipex', 'native', 'torch')
    """
    return _BACKENDS.names()


def find_backend(name: str = "auto") -> type[CpuBackend]:
    """The backend class of that name.

    Parameters
    ----------
    name : str
        One of :func:`backend_names`.

    Returns
    -------
    type of CpuBackend

    Raises
    ------
    ConfigError
        If the name is unknown, or that backend cannot run here.

    Examples
    --------
    >>> from scout_hf.kernels.cpu import find_backend
    >>> find_backend("torch").__name__
    'TorchBackend'
    """
    if name == "auto":
        return NativeBackend if load_library() is not None else TorchBackend
    found = _BACKENDS.find(name)
    if found is NativeBackend and load_library() is None:
        raise ConfigError(
            "cpu_backend='native' is not possible: scout_hf was installed without its native library; reinstall it "
            "with g++ or clang installed, or leave cpu_backend='auto'"
        )
    if found is IpexBackend:
        load_op()
    return found


def make_backend(name: str = "auto", threads: int | None = None, spin_us: int | None = None) -> CpuBackend:
    """Create a backend.

    Parameters
    ----------
    name : str
        One of :func:`backend_names`.
    threads : int or None
        Threads for background jobs; None leaves the number to the backend.
    spin_us : int or None
        Microseconds for which native threads look out for work before they sleep; None for the backend's default.

    Returns
    -------
    CpuBackend

    Raises
    ------
    ConfigError
        As :func:`find_backend`.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.kernels.cpu import make_backend
    >>> from scout_hf.stores import PagedKV
    >>> store = PagedKV(1, 2, 8, 4, torch.float32, "cpu")
    >>> store.append(*torch.randn(2, 1, 2, 6, 8))
    >>> attended = make_backend("torch").attend_blocks(torch.randn(1, 4, 1, 8), store, None, scale=8**-0.5)
    >>> attended.tokens, attended.partial.out.shape
    (12, torch.Size([1, 4, 1, 8]))
    """
    backend = find_backend(name)(threads)
    if spin_us is not None:
        backend.spin_us = spin_us
    return backend
