"""What is launched, written down such that any version of Triton can compile it later, without a GPU."""

from __future__ import annotations

import importlib
import json
from typing import NamedTuple

import torch

FAR = 1 << 33  # a number that takes 64 bits
DTYPES = {str(dtype): dtype for dtype in (
    torch.bfloat16, torch.float16, torch.float32, torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64,
)}  # fmt: skip


class Launch(NamedTuple):
    """A launch, without what the compiler is not told: of addresses and numbers it knows whether 16 divides them."""

    module: str
    kernel: str
    arguments: tuple
    options: tuple

    @classmethod
    def of(cls, kernel, args, options) -> Launch:
        sizes = {name: value for name, value in options.items() if name in ("num_warps", "num_stages")}
        given = dict(zip([param.name for param in kernel.params], args))
        given |= {name: value for name, value in options.items() if name not in sizes}
        fixed = {param.name for param in kernel.params if param.is_constexpr}
        alike = {
            param.name for param in kernel.params if param.do_not_specialize or param.do_not_specialize_on_alignment
        }
        arguments = (
            (name, value if name in fixed else _class_of(value, name not in alike)) for name, value in given.items()
        )
        return cls(kernel.fn.__module__, kernel.fn.__name__, tuple(arguments), tuple(sizes.items()))

    def compiled(self):
        """The kernel as it would be launched; Triton's driver must be a stand-in."""
        kernel = getattr(importlib.import_module(self.module), self.kernel).kernel
        given = {name: _example_of(value) for name, value in self.arguments}
        return kernel.run(grid=(1,), warmup=True, **given, **dict(self.options))


def _class_of(value, specialised=True):
    if isinstance(value, torch.Tensor):
        return ("tensor", str(value.dtype), specialised and value.data_ptr() % 16 == 0)
    if isinstance(value, float):
        return 0.5
    if value is None or isinstance(value, bool) or (specialised and value == 1):
        return value
    return (0 if -(2**31) <= value < 2**31 else FAR) + (16 if specialised and value % 16 == 0 else 17)


def _example_of(value):
    if not isinstance(value, tuple):
        return value
    _, dtype, aligned = value
    return torch.zeros(16, dtype=DTYPES[dtype], device="cpu")[0 if aligned else 1 :]


def dumped(launches) -> str:
    return json.dumps(sorted(map(list, launches), key=str))


def loaded(text: str) -> list[Launch]:
    return [Launch(*map(_tuples, each)) for each in json.loads(text)]


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
