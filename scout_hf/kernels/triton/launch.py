"""Launch kernels with less work on the host: Triton's own launch binds and specialises every argument each time.

What Triton has compiled for arguments of one kind is kept, and launched by what is documented of it:
``kernel.warmup(...)`` compiles, ``compiled[grid](...)`` launches.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime import driver

from scout_hf.kernels.triton.support import INTERPRETED

# Numbers that grow with the context make new kinds; the oldest go first.
MOST_KINDS = 1024
# Triton distinguishes addresses that 16 divides.
UNALIGNED = 15


@functools.cache
def _gpus() -> int:
    return torch.cuda.device_count()


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context manager: make the tensor's device current, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


class Prepared:
    """A Triton kernel whose ``launch(grid, *args, **options)`` does what ``kernel[grid](*args, **options)`` does.

    Two calls are of one kind if they have the same grid, options and numbers, and tensors of the same dtypes and
    alignment. That is finer than what Triton distinguishes, so what was compiled for one serves the other. A number
    must be an int in all calls, or a float in all.

    Parameters
    ----------
    kernel : JITFunction
        Takes tensors first, the first of them on the device and others maybe None, then numbers.
    """

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self._launches: dict[tuple[Any, ...], Callable[..., None]] = {}
        self._tensors: int | None = None

    def launch(self, grid: tuple[int, ...], /, *args: Any, **options: Any) -> None:
        """Launch on the device of the first tensor."""
        device = args[0].get_device()
        # One GPU is always the current one.
        if _gpus() > 1 and device != torch.cuda.current_device():
            with on_device_of(args[0]):
                self.launch(grid, *args, **options)
            return
        count = self._tensors
        if count is None:
            is_tensor = [arg is None or isinstance(arg, torch.Tensor) for arg in args]
            count = self._tensors = is_tensor.index(False)
        dtypes: list[Any] = []
        addresses = 0
        for arg in args[:count]:
            if arg is None:
                dtypes.append(None)
            else:
                dtypes.append(arg.dtype)
                addresses |= arg.data_ptr()
        if addresses & UNALIGNED:
            dtypes += [arg is not None and arg.data_ptr() & UNALIGNED == 0 for arg in args[:count]]
        key = device, grid, args[count:], *dtypes, *options.values()
        launch = self._launches.get(key)
        if launch is None:
            launch = self._prepare(grid, args, options)
            if launch is None:
                return
            if len(self._launches) >= MOST_KINDS:
                del self._launches[next(iter(self._launches))]
            self._launches[key] = launch
        launch(*args, stream=driver.active.get_current_stream(device))

    def _prepare(self, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        compiled = self.kernel.warmup(*args, grid=grid, **options)
        if compiled is None:
            return None
        launch, names = compiled[(*grid, 1, 1)[:3]], self.kernel.arg_names[len(args) :]
        fixed = tuple(options[name] for name in names)
        return (lambda *given, stream: launch(*given, *fixed, stream=stream)) if fixed else launch


class Interpreted:
    """A kernel in Triton's interpreter, launched in the same way."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def launch(self, grid: tuple[int, ...], /, *args: Any, **options: Any) -> None:
        """Launch on the device of the first tensor."""
        with on_device_of(args[0]):
            self.kernel[grid](*args, **options)


def prepared(kernel: Any) -> Prepared | Interpreted:
    """Decorate a Triton kernel to be launched as a :class:`Prepared`, or in the interpreter."""
    return Interpreted(kernel) if INTERPRETED else Prepared(kernel)
