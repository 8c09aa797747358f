"""The native CPU library: loading, struct layouts, instruction sets.

``load_library()`` returns None, with one warning, if the package was installed without a compiler.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import warnings
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch

from scout_hf.errors import ConfigError
from scout_hf.kernels.cpu.shared_object import check_whole

ABI = 9
ISA_VARIABLE = "SCOUT_HF_ISA"
PATH_VARIABLE = "SCOUT_HF_LIBRARY"
INT8 = 3
SCORERS = {"minmax": 0, "sign": 1, "dots": 2, "dots4": 3}
MAX_HEAD_DIM, MAX_BLOCK, MAX_PARTS = 576, 256, 1024
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PLAIN = {number: dtype for dtype, number in DTYPES.items()}
STATUS = {-1: "sizes or types that the library does not know", -2: "no memory", -3: "a block that is not there"}


class StoreArgs(ctypes.Structure):
    """``scout_store``: paged keys and values of one layer."""

    _fields_ = [
        ("pages", c_void_p),
        ("pages_stride", c_int64),
        ("length", c_int64),
        ("tail", c_void_p),
        ("batch", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("dtype", c_int32),
        ("plain_dtype", c_int32),
    ]


class AttendArgs(ctypes.Structure):
    """``scout_attend_args``: attention of one or several queries per row over listed blocks, or over all."""

    _fields_ = [
        ("store", StoreArgs),
        ("query", c_void_p),
        ("query_row", c_int64),
        ("query_head", c_int64),
        ("query_token", c_int64),
        ("blocks", c_void_p),
        ("counts", c_void_p),
        ("blocks_stride", c_int64),
        ("padding_mask", c_void_p),
        ("padding_mask_stride", c_int64),
        ("out", c_void_p),
        ("lse", c_void_p),
        ("done", c_void_p),
        ("number", c_uint64),
        ("attended", c_int64),
        ("count", c_int32),
        ("query_heads", c_int32),
        ("query_dtype", c_int32),
        ("out_dtype", c_int32),
        ("status", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("queries", c_int32),
        ("end", c_int64),
    ]


class StepArgs(ctypes.Structure):
    """``scout_step_job``: attention of one layer that is submitted once per decode step, and sums over its jobs."""

    _fields_ = [
        ("attend", AttendArgs),
        ("flag", c_void_p),
        ("chosen", c_void_p),
        ("trouble", c_void_p),
        ("ticket", c_int64),
        ("counted", c_int64),
        ("tokens", c_int64),
        ("listed_blocks", c_int64),
        ("chosen_blocks", c_int64),
    ]


class SelectArgs(ctypes.Structure):
    """``scout_select_args``: the top-k blocks in ascending order, then the newest."""

    _fields_ = [
        ("query", c_void_p),
        ("query_row", c_int64),
        ("query_head", c_int64),
        ("codes", c_void_p),
        ("codes_row", c_int64),
        ("codes_head", c_int64),
        ("codes_block", c_int64),
        ("padding_mask", c_void_p),
        ("padding_mask_stride", c_int64),
        ("want", c_void_p),
        ("blocks", c_void_p),
        ("counts", c_void_p),
        ("blocks_stride", c_int64),
        ("scores", c_void_p),
        ("batch", c_int32),
        ("kv_heads", c_int32),
        ("query_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("query_dtype", c_int32),
        ("code_dtype", c_int32),
        ("code", c_int32),
        ("candidates", c_int32),
        ("newest", c_int32),
        ("count", c_int32),
        ("sinks", c_int32),
        ("scorer", c_int32),
        ("least", c_int32),
        ("mass", c_float),
        ("recent", c_void_p),
        ("coarse_dim", c_int32),
        ("fine", c_int32),
    ]


class AppendArgs(ctypes.Structure):
    """``scout_append_args``: write new tokens into allocated pages."""

    _fields_ = [
        ("store", StoreArgs),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_strides", c_int64 * 3),
        ("value_strides", c_int64 * 3),
        ("tokens", c_int64),
    ]


class GatherArgs(ctypes.Structure):
    """``scout_gather_args``: blocks to unpacked keys and values."""

    _fields_ = [
        ("store", StoreArgs),
        ("blocks", c_void_p),
        ("count", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
    ]


class MinMaxArgs(ctypes.Structure):
    """``scout_minmax_args``: channel-wise bounds of whole blocks."""

    _fields_ = [
        ("store", StoreArgs),
        ("padding_mask", c_void_p),
        ("padding_mask_stride", c_int64),
        ("codes", c_void_p),
        ("codes_row", c_int64),
        ("codes_head", c_int64),
        ("first", c_int64),
        ("last", c_int64),
    ]


_SIGNATURES = {
    "scout_abi": (c_int, []),
    "scout_tile_bytes": (c_int64, [c_int, c_int, c_int]),
    "scout_isa_count": (c_int, []),
    "scout_isa_name": (c_char_p, [c_int]),
    "scout_use_isa": (c_int, [c_int]),
    "scout_current_isa": (c_int, []),
    "scout_set_team": (None, [c_void_p]),
    "scout_attend": (c_int, [POINTER(AttendArgs), c_int]),
    "scout_select": (c_int, [POINTER(SelectArgs), c_int]),
    "scout_append": (c_int, [POINTER(AppendArgs), c_int]),
    "scout_gather": (c_int, [POINTER(GatherArgs), c_int]),
    "scout_minmax": (c_int, [POINTER(MinMaxArgs), c_int]),
    "scout_read_tiles": (c_int64, [POINTER(AttendArgs), c_int]),
    "scout_read_span": (c_int64, [c_void_p, c_int64, c_int]),
    "scout_submit_attend": (c_int64, [c_void_p, POINTER(AttendArgs), c_void_p, c_uint64]),
    "scout_submit_step": (c_int64, [c_void_p, c_void_p, c_int64]),
}


class Library:
    """The loaded library; its functions are attributes by their C names without the prefix (``attend``, ``select``).

    Parameters
    ----------
    path : Path
        The shared object.

    Raises
    ------
    OSError
        If the file is truncated, cannot be loaded, or has another ABI version.
    """

    abi: Callable[[], int]
    tile_bytes: Callable[[int, int, int], int]
    isa_count: Callable[[], int]
    isa_name: Callable[[int], bytes]
    use_isa: Callable[[int], int]
    current_isa: Callable[[], int]
    set_team: Callable[[int], None]
    # Each takes a pointer to its struct and a number of threads.
    attend: Callable[[Any, int], int]
    select: Callable[[Any, int], int]
    append: Callable[[Any, int], int]
    gather: Callable[[Any, int], int]
    minmax: Callable[[Any, int], int]
    read_tiles: Callable[[Any, int], int]
    read_span: Callable[[int, int, int], int]

    def __init__(self, path: Path):
        self.path = path
        check_whole(path)
        self.handle = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.handle, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("scout_"), function)
        if self.abi() != ABI:
            raise OSError(f"{path} has ABI version {self.abi()}, this code needs {ABI}; reinstall scout_hf")
        entry = _openmp_entry()
        if entry is not None:
            self.set_team(entry)

    def isas(self) -> tuple[str, ...]:
        """Instruction sets that run on this machine, the best last."""
        return tuple(self.isa_name(index).decode() for index in range(self.isa_count()))

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self.isa_name(self.current_isa()).decode()

    def choose_isa(self, name: str) -> None:
        """Set the instruction set for the whole process; ConfigError if this machine lacks it."""
        if name not in self.isas():
            raise ConfigError(
                f"{ISA_VARIABLE}={name!r} is not allowed: this machine runs {', '.join(self.isas())}; unset it for the "
                "best one"
            )
        self.use_isa(self.isas().index(name))


@functools.cache
def load_library() -> Library | None:
    """The library that was installed with the package; None, with a warning at the first call, if there is none.

    The environment variable ``SCOUT_HF_ISA`` sets the instruction set, ``SCOUT_HF_LIBRARY`` the file; if the latter is
    empty, no library is used.
    """
    path = find_library()
    reason, cure = "it was installed without a C++ compiler, or for another platform", "reinstall"
    checkout = Path(__file__).parents[3]
    if (checkout / "setup.py").is_file():
        reason, cure = f"{checkout} is a checkout in which it was not built", "run `pip install -e .` there"
    if path is not None:
        try:
            library = Library(path)
        except (OSError, AttributeError) as error:
            reason, cure = f"it cannot be loaded: {error}", "reinstall"
        else:
            if os.environ.get(ISA_VARIABLE):
                library.choose_isa(os.environ[ISA_VARIABLE])
            return library
    if os.environ.get(PATH_VARIABLE) != "":
        warnings.warn(
            f"scout_hf runs without its native CPU library: {reason}. Everything works, several times slower on the "
            f"CPU; {cure} with g++ or clang installed to get it.",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def find_library() -> Path | None:
    """The path of the library, or None."""
    given = os.environ.get(PATH_VARIABLE)
    if given is not None:
        return Path(given) if given else None
    found = sorted(Path(__file__).parent.glob("_scout_cpu*.so")) + sorted(
        Path(__file__).parent.glob("_scout_cpu*.dylib")
    )
    return found[0] if found else None


def check(status: int, what: str) -> None:
    """Raise RuntimeError for an error status; the checks of the callers should make that impossible."""
    if status:
        raise RuntimeError(
            f"scout_hf's native library refused {what}: {STATUS.get(status, status)}; please report this"
        )


def _openmp_entry() -> int | None:
    """Address of GOMP_parallel in the OpenMP library that torch has loaded, to share one team of threads."""
    try:
        # Look it up through torch's library: several OpenMP libraries may be loaded.
        own = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        return ctypes.cast(ctypes.CDLL(str(own)).GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        pass
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    for path in sorted(set(re.findall(r"\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so\S*", maps))):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, c_void_p).value
        except (OSError, AttributeError):
            continue
    return None
