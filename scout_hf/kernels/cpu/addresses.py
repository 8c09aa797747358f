"""Convert tensors to addresses for native code, which cannot check them: dtype, device and layout are checked here."""

from __future__ import annotations

import torch

from scout_hf.errors import NativeInputError


def address(tensor: torch.Tensor, *dtypes: torch.dtype, strided: bool = False) -> int:
    """The address of a tensor in host memory.

    Parameters
    ----------
    tensor : Tensor
    *dtypes : torch.dtype
        Allowed dtypes.
    strided : bool
        Allow any strides but the last, which must be 1; else the tensor must be contiguous.

    Returns
    -------
    int

    Raises
    ------
    NativeInputError
        If the tensor has another dtype, is not in host memory, or has other strides.
    """
    if tensor.dtype in dtypes and tensor.is_cpu and (tensor.stride(-1) == 1 if strided else tensor.is_contiguous()):
        return tensor.data_ptr()
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise NativeInputError(
        f"native code got {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} with strides "
        f"{tensor.stride()} on {tensor.device}; it takes {names} in host memory, "
        f"{'the last stride 1' if strided else 'contiguous'}. If a method or digest of your own made this tensor, "
        "convert it there; else please report this"
    )
