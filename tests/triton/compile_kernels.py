"""Compiles every launch for GPUs that need not be there, and holds the machine code to budgets. A program.

Usage: TRITON_INTERPRET=0 python -m tests.triton.compile_kernels [FILE] [--capability 90] [--once]. With a FILE: the
launches that ``tests.gpu.without_gpu`` wrote down. Without: those at the shapes of large models, which have budgets.
Prints a line per kernel, and fails if one does not compile or exceeds its budget; budgets are those of capability 9.0.
``--once``: one of each kernel.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.triton import artefacts, budgets, shapes
from tests.triton.launches import Launch, loaded

BULK, SHARED = 2, {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
RUN = JITFunction.run


class NoGpu:
    """Triton's driver of a GPU that is not there; its number is its capability."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def named_launches() -> dict[Launch, str]:
    """Launches of all shapes, each once, and what they are."""
    found: dict[Launch, str] = {}
    for shape in shapes.SHAPES:
        for name, call in shapes.launches(shape):
            JITFunction.run = functools.partialmethod(written_down, found, name)
            call()
    JITFunction.run = RUN
    return found


def written_down(kernel, found, name, *args, grid, warmup, **options):
    found.setdefault(Launch.of(kernel, args, options), name)


# Bytes. Triton 3.6 keeps two registers of the radix choice on the stack; 3.9 none.
OTHER_STACK = {("_choose", 100): 8}


def faults(launch: Launch, name: str) -> list[str]:
    """Compile it, and say what is wrong with it."""
    capability = driver.active.get_current_device()
    budgeted = bool(name) and capability == 90
    try:
        # Hundreds of launches have no name: to disassemble them takes longer than to compile them.
        code = artefacts.read(launch.compiled(), instructions=bool(name))
    except Exception as error:  # whatever the compiler says
        return [f"does not compile: {' '.join(str(error).split())[-300:]}"]
    instructions = len(code.opcodes) if name else "not counted"
    sizes = f"registers {code.registers}; stack {code.stack}; shared {code.shared}; instructions {instructions}"
    print(f"{launch.kernel}; {name or '-'}; sm_{capability}; {sizes}", flush=True)
    found = list(budgets.excesses(name, code)) if budgeted else []
    if code.shared > SHARED[capability]:
        found.append(f"{code.shared} bytes of shared memory, there are {SHARED[capability]}")
    if not budgeted and code.stack > OTHER_STACK.get((launch.kernel, capability), 0):
        found.append(f"stack of {code.stack} bytes")
    return found


def planted(named: dict[Launch, str]) -> list[str]:
    """A head that the compiler must refuse: of 8 channels, in a tile of 8."""
    for launch in named:
        if launch.kernel == "_attend":
            small = {"DIM": 8, "COLUMNS": 8}
            head = launch._replace(arguments=tuple((key, small.get(key, value)) for key, value in launch.arguments))
            try:
                head.compiled()
            except Exception:
                return []
            return ["a head of 8 channels in a tile of 8 was not refused"]
    return ["there is no launch of _attend"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", nargs="?")
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--once", action="store_true")
    given = parser.parse_args()
    driver.set_active(NoGpu(given.capability))
    if given.file:
        named = dict.fromkeys(loaded(Path(given.file).read_text()), "")
    else:
        named = named_launches()
    wrong, seen = planted(named), set()
    for launch, name in named.items():
        prefetch = dict(launch.arguments).get("PREFETCH")
        if (given.once and (launch.kernel, prefetch) in seen) or (prefetch == BULK and given.capability < 90):
            continue
        seen.add((launch.kernel, prefetch))
        wrong += [f"{launch.kernel} ({name or dict(launch.arguments)}): {each}" for each in faults(launch, name)]
    print(f"triton {triton.__version__}, sm_{given.capability}: {len(named)} launches")
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
