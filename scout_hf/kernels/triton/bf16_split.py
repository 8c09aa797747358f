"""Round float32, and split it into a sum of two bfloat16 numbers (relative error about 2**-17) for tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from scout_hf.kernels.triton.support import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def to_nearest(x):
    """Round float32 to the nearest bfloat16; the interpreter's own cast truncates."""
    if _INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def rounded(x, KIND: tl.constexpr):
    """Round float32 to the nearest number of a dtype."""
    if KIND == tl.bfloat16:
        return to_nearest(x)
    else:
        return x.to(KIND)


@triton.jit
def bf16_split(x):
    """The bfloat16 nearest to each float32, and the bfloat16 nearest to the remainder."""
    high = to_nearest(x)
    return high, to_nearest(x - high.to(tl.float32))
