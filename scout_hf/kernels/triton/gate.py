"""The gate of a feed-forward block, ``silu(gate) * up``, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.bf16_split import rounded
from scout_hf.kernels.triton.launch import prepared

COLUMNS = 1024


@prepared
@triton.jit
def _silu_product(gate, up, out, count, COLUMNS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    within = place < count
    opening = tl.load(gate + place, mask=within, other=0.0).to(tl.float32)
    values = tl.load(up + place, mask=within, other=0.0).to(tl.float32)
    KIND: tl.constexpr = gate.dtype.element_ty
    opened = rounded(tl.div_rn(opening, 1.0 + tl.exp(-opening)), KIND).to(tl.float32)
    tl.store(out + place, rounded(opened * values, KIND), mask=within)


def silu_product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``torch.nn.functional.silu(gate) * up``.

    Parameters
    ----------
    gate, up : Tensor (...)
        Of one shape, contiguous, in bfloat16, float16 or float32.

    Returns
    -------
    Tensor (...)

    Examples
    --------
    >>> gate, up = torch.zeros(8, 1, 14336, device="cuda"), torch.ones(8, 1, 14336, device="cuda")  # doctest: +SKIP
    >>> silu_product(gate, up).abs().sum().cpu()  # doctest: +SKIP
    tensor(0.)
    """
    out, count = torch.empty_like(gate), gate.numel()
    _silu_product.launch((-(-count // COLUMNS),), gate, up, out, count, COLUMNS, num_warps=4)
    return out
