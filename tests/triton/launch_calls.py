"""What a prepared launch does beside Triton's own; a stand-in for the driver notes launches. A program."""

from __future__ import annotations

import sys
from collections import Counter

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from scout_hf.kernels.triton.launch import Prepared

LAUNCHED = []


class Utils:
    """Of the driver: nothing is loaded."""

    @staticmethod
    def load_binary(name, *more):
        return 1, 2, 32, 0, 1024

    @staticmethod
    def get_device_properties(device):
        return {"max_shared_mem": 227 << 10}

    @staticmethod
    def unload_module(module):
        pass


class Launcher:
    """Of a compiled kernel: notes which, and its arguments."""

    def __init__(self, source, metadata):
        self.hash = metadata.hash

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        LAUNCHED.append(((x, y, z), stream, self.hash, args))


class Driver:
    utils, launcher_cls, device = Utils, Launcher, 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 70 + device

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class OnGpu(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    def get_device(self):
        return Driver.device


@triton.jit(do_not_specialize=["size"])
def _fill(into, marks, stride, size, scale, BLOCK: tl.constexpr, HAS_MARKS: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.full([BLOCK], scale, tl.float32)
    if HAS_MARKS:
        value += tl.load(marks + at, mask=at < size, other=0)
    tl.store(into + at * stride, value, mask=at < size)


def tensor(dtype=torch.float32, first=0):
    return torch.zeros(64, dtype=dtype)[first:].as_subclass(OnGpu)


CALLS = {
    "plain": (tensor(), None, 4, 64, 0.5, 32, False),
    "another size": (tensor(), None, 4, 63, 0.5, 32, False),
    "a stride of 1": (tensor(), None, 1, 64, 0.5, 32, False),
    "a stride that 16 divides": (tensor(), None, 16, 64, 0.5, 32, False),
    "a far stride": (tensor(), None, 1 << 33, 64, 0.5, 32, False),
    "not aligned": (tensor(first=1), None, 4, 64, 0.5, 32, False),
    "another dtype": (tensor(torch.bfloat16), None, 4, 64, 0.5, 32, False),
    "marks": (tensor(), tensor(torch.int32), 4, 64, 0.5, 32, True),
    "marks not aligned": (tensor(), tensor(torch.int32, 3), 4, 64, 0.5, 32, True),
    "a wider block": (tensor(), None, 4, 64, 2.5, 64, False),
}


def last(kernel, args, **options):
    kernel.launch((2,), *args, **options) if isinstance(kernel, Prepared) else kernel[(2,)](*args, **options)
    return LAUNCHED[-1]


def alike(one, other):
    return one[:3] == other[:3] and all(
        a is b or (type(a) is type(b) and not isinstance(a, torch.Tensor) and a == b) for a, b in zip(one[3], other[3])
    )


def calls(kernel) -> Counter:
    """Calls of Python and of C that a repeated launch makes."""
    last(kernel, CALLS["plain"]), last(kernel, CALLS["plain"])
    found: Counter = Counter()
    sys.setprofile(lambda frame, event, arg: found.update([event]))
    last(kernel, CALLS["plain"])
    sys.setprofile(None)
    return found


def main() -> None:
    driver.set_active(Driver())
    ours = Prepared(_fill)
    hashes = {}
    for _ in range(2):  # the second time from what was kept
        for name, args in CALLS.items():
            theirs = last(_fill, args)
            assert len(theirs[3]) == len(args), theirs
            assert alike(last(ours, args), theirs), name
            by_name = last(ours, args[:-2], BLOCK=args[-2], HAS_MARKS=args[-1])
            assert alike(by_name, theirs), f"{name}, by name"
            hashes[name] = theirs[2]
    assert len(set(hashes.values())) == len(hashes) - 1, hashes  # the size alone makes no other kernel
    assert last(ours, CALLS["plain"], num_warps=8)[2] not in hashes.values()
    Driver.device = 1
    assert last(ours, CALLS["plain"])[1] == 71
    Driver.device = 0
    made, was = calls(ours), calls(_fill)
    print(f"prepared {made['call']} {made['c_call']}; triton {was['call']} {was['c_call']}")


if __name__ == "__main__":
    main()
