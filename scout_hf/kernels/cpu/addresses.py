"""The one place where a tensor becomes an address: native code believes it, so what it will read is checked before."""

from __future__ import annotations

import torch

from scout_hf.errors import NativeInputError


def address(tensor: torch.Tensor, *dtypes: torch.dtype, strided: bool = False) -> int:
    """Where the first number of a tensor in host memory is.

    Parameters
    ----------
    tensor : Tensor
    *dtypes : torch.dtype
        What the native code can take it for.
    strided : bool
        Whether the code is told all strides but the last, which is 1; else the tensor must be contiguous.

    Raises
    ------
    NativeInputError
        If it is of another dtype, elsewhere, or in another order.
    """
    if tensor.dtype in dtypes and tensor.is_cpu and (tensor.stride(-1) == 1 if strided else tensor.is_contiguous()):
        return tensor.data_ptr()
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise NativeInputError(
        f"native code was about to read {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} with strides "
        f"{tensor.stride()} on {tensor.device}; it takes {names} in host memory, "
        f"{'the last stride 1' if strided else 'contiguous'}. Convert it where a method or digest of your own made it, "
        "else please report this"
    )
