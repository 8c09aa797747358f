"""Launch kernels with less work on the host: Triton's own launch binds and specialises every argument each time.

What Triton has compiled for arguments of one kind is kept, and launched by what is documented of it:
``kernel.warmup(...)`` compiles, ``compiled[grid](...)`` launches.
"""

from __future__ import annotations

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


class Prepared:
    """A Triton kernel that is launched like any other, ``kernel[grid](*args, **options)``, on the current device.

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

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], /, *args: Any, **options: Any) -> None:
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
        device = args[0].get_device()
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


def prepared(kernel: Any) -> Any:
    """Decorate a Triton kernel to be launched as a :class:`Prepared`; in the interpreter it stays what it is."""
    return kernel if INTERPRETED else Prepared(kernel)
