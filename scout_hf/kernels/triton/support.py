"""Shared by the Triton kernels: functions that also work in the interpreter, and sizes of launches.

Triton's interpreter (``TRITON_INTERPRET=1`` before triton is imported) runs the same kernels on CPU tensors.
"""

from __future__ import annotations

import functools
import os

import torch
import triton
import triton.language as tl

# Triton reads the variable once, at import.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_INTERPRETED = tl.constexpr(INTERPRETED)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# The fewest rows, and channels summed over, that tl.dot accepts on tensor cores.
MIN_ROWS = 16
_MIN_SUMMED = tl.constexpr(MIN_ROWS)


@triton.jit
def dot(left, right):
    """Matrix product with float32 accumulation; in float32 in the interpreter, whose bfloat16 products are wrong."""
    # Triton 3.6 refuses fewer; later versions and the interpreter do not, so they would not find the mistake.
    tl.static_assert(left.shape[1] >= _MIN_SUMMED, "tl.dot needs 16 or more channels to sum over")
    if _INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32))
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def tanh(x):
    """tanh to float32 precision, with portable operations; a series for small values, where the formula cancels."""
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return tl.where(square < 0.0625, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


# Triton's own is slow on the host, as its compiler can call it too; launches ask for the same few sizes.
next_power_of_2 = functools.lru_cache(triton.next_power_of_2)


def runs_on(tensor: torch.Tensor) -> bool:
    """Whether kernels can use this tensor: on a GPU, or anywhere in the interpreter."""
    return tensor.is_cuda or INTERPRETED


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
