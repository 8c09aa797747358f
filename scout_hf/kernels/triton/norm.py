"""RMS norm of a decode step's few rows, in one launch in place of torch's eight.

Rounds where the modules of transformers round. Liger-Kernel has such a kernel for training (it also writes what a
backward pass reads, and takes no strides); see ``docs/gpu.md``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from scout_hf.kernels.triton.bf16_split import rounded
from scout_hf.kernels.triton.launch import prepared
from scout_hf.kernels.triton.support import next_power_of_2


@prepared
@triton.jit
def _rms_norm(
    x, weight, out, x_outer, x_inner, out_outer, out_inner, inner, eps,
    DIM: tl.constexpr, COLUMNS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    outer, at = (tl.program_id(0) // inner).to(tl.int64), tl.program_id(0) % inner
    column = tl.arange(0, COLUMNS)
    within = column < DIM
    KIND: tl.constexpr = x.dtype.element_ty
    values = tl.load(x + outer * x_outer + at * x_inner + column, mask=within, other=0.0).to(tl.float32)
    factors = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)
    scaled = values * tl.rsqrt(tl.sum(values * values, 0) / DIM + eps)
    if SHIFTED:
        result = scaled * (1.0 + factors)
    else:
        result = rounded(scaled, KIND).to(tl.float32) * factors
    target = out + outer * out_outer + at * out_inner + column
    tl.store(target, rounded(result, KIND), mask=within)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, shifted: bool = False) -> torch.Tensor:
    """Each row by its root mean square, and by the weight.

    Parameters
    ----------
    x : Tensor (outer, inner, channels)
        bfloat16, float16 or float32, at most 16384 channels, as one program holds a row; the last stride must be 1.
    weight : Tensor (channels,)
        In the same dtype, contiguous.
    eps : float
        Added to the mean square.
    shifted : bool
        Multiply by 1 + weight, in float32, as Gemma does; else by the weight, after rounding to the dtype of ``x``.

    Returns
    -------
    Tensor (outer, inner, channels)
        In the dtype of ``x``, and in its order in memory where that has no gaps.

    Examples
    --------
    >>> x, weight = torch.randn(8, 1, 4096, device="cuda"), torch.ones(4096, device="cuda")  # doctest: +SKIP
    >>> rms_norm(x, weight, 1e-6).square().mean(-1)[0].cpu()  # doctest: +SKIP
    tensor([1.0000])
    """
    outer, inner, dim = x.shape
    out, columns = torch.empty_like(x), next_power_of_2(dim)
    _rms_norm.launch(
        (outer * inner,),
        x, weight, out, *x.stride()[:2], *out.stride()[:2], inner, eps, dim, columns, shifted,
        num_warps=min(16, max(1, columns // 512)),
    )  # fmt: skip
    return out
