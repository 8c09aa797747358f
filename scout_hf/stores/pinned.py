"""Pin host memory for GPUs, and the addresses at which they read it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import Any

import torch

from scout_hf.errors import PinnedMemoryError

# For every GPU of the process; mapped into its addresses.
PORTABLE, MAPPED = 1, 2
CAN_USE_HOST_POINTER = 91
"""The driver's CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM."""


def pin(address: int, bytes_needed: int) -> None:
    """Pin memory that exists already; PinnedMemoryError if the driver cannot."""
    host_address_serves()
    status = int(torch.cuda.cudart().cudaHostRegister(address, bytes_needed, PORTABLE | MAPPED))
    if status:
        # CUDA keeps the error until the next call that checks: make that call here, not in unrelated code.
        with contextlib.suppress(RuntimeError, AssertionError):
            torch.zeros(1, dtype=torch.float32, device="cuda")
        raise PinnedMemoryError(
            f"cannot pin {bytes_needed / 2**30:.1f} GiB of host memory (CUDA error {status}); allowed is "
            'what `ulimit -l` and free memory leave: raise the limit, use host_dtype="int8", or shorten the context'
        )


def unpin(address: int) -> None:
    """Undo :func:`pin`, after all work that was launched: kernels of a dropped cache may still read that memory."""
    for number in range(torch.cuda.device_count()):
        # Without memory nothing was launched there. A capture cannot wait.
        if torch.cuda.memory_reserved(number) and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize(number)
    torch.cuda.cudart().cudaHostUnregister(address)


@functools.lru_cache
def host_address_serves() -> bool:
    """Whether each GPU reads pinned memory at its host address; else only at :func:`device_address`. Asked once."""
    if torch.version.hip:
        return True
    driver, answer, device = _driver(), ctypes.c_int(), ctypes.c_int()
    for number in range(torch.cuda.device_count()):
        _check(driver.cuDeviceGet(ctypes.byref(device), number))
        _check(driver.cuDeviceGetAttribute(ctypes.byref(answer), CAN_USE_HOST_POINTER, device))
        if not answer.value:
            return False
    return True


def device_address(address: int) -> int:
    """Where the GPUs read pinned memory that the CPU has at ``address``."""
    found = ctypes.c_uint64()
    _check(_driver().cuMemHostGetDevicePointer_v2(ctypes.byref(found), ctypes.c_void_p(address), 0))
    return found.value


def _driver() -> Any:
    # torch has loaded it; its Python interface has neither question.
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        raise PinnedMemoryError(
            f"the CUDA driver does not say where a GPU reads pinned memory (CUDA error {status}); "
            "update the driver, or keep the model on the CPU"
        )
