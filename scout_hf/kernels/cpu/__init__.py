"""The seam for attention over host pages: one interface, the best implementation this machine has.

A backend attends to chosen blocks of a paged store. ``auto`` takes the first that works here; a name forces one.
"""

from __future__ import annotations

from scout_hf.errors import ConfigError
from scout_hf.kernels.cpu.torch_backend import TorchBackend

_BACKENDS = {"torch": TorchBackend}
_ORDER = ("torch",)


def backend_names() -> tuple[str, ...]:
    """Names that ``ScoutConfig(cpu_backend=...)`` takes."""
    return ("auto", *sorted(_BACKENDS))


def make_backend(name: str = "auto"):
    """The backend of that name, or ConfigError with the names there are."""
    if name == "auto":
        name = _ORDER[0]
    if name not in _BACKENDS:
        raise ConfigError(f"cpu_backend={name!r} is not known; available are {', '.join(map(repr, backend_names()))}")
    return _BACKENDS[name]()
