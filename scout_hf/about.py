"""Versions and hardware, for bug reports."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator
from importlib import metadata

import scout_hf


def facts() -> Iterator[tuple[str, str]]:
    """Name and value of each line of ``scout-hf version``."""
    yield "scout_hf", scout_hf.__version__
    yield "transformers", _version("transformers")
    yield "torch", _version("torch")
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.release()}, {platform.machine()}"
    yield "native code", _native()
    yield "GPU", _gpu()
    yield "memory", _memory()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _native() -> str:
    from scout_hf.kernels.cpu.library import load_library

    with warnings.catch_warnings():
        # The line itself says what the warning would say.
        warnings.simplefilter("ignore")
        library = load_library()
    if library is None:
        return "no, torch does its work, several times slower; install again with g++ or clang at hand"
    return f"yes, for {library.isa} (it has {', '.join(library.isas())})"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no, one tier in host memory"
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"yes, {', '.join(names)}; CUDA {torch.version.cuda}, triton {_version('triton')}"


def _memory() -> str:
    import psutil
    import torch

    return f"{psutil.virtual_memory().total / 2**30:.1f} GiB; torch uses {torch.get_num_threads()} threads"
