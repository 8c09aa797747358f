"""A float32 as a sum of two bfloat16 numbers: what tensor cores multiply at full speed, to about 2**-17 of it."""

from __future__ import annotations

import triton
import triton.language as tl

from scout_hf.kernels.triton.support import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def to_nearest(x):
    """Float32 to the nearest bfloat16. The interpreter's own cast cuts the low bits off."""
    if _INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def bf16_split(x):
    """The bfloat16 nearest to each float32, and the one nearest to what is left."""
    high = to_nearest(x)
    return high, to_nearest(x - high.to(tl.float32))
