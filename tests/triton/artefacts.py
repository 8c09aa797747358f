"""What the machine code of a kernel says of itself: registers, stack, loads, buffers, the order of what it does."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from typing import NamedTuple

from triton import knobs


class Artefact(NamedTuple):
    """Of one kernel for one GPU.

    registers, stack : int
        Per thread; bytes of stack.
    shared : int
        Bytes of shared memory of a block of threads.
    opcodes : list of str
        SASS instructions in order, without operands: ``"LDG.E.128"``.
    buffers : dict
        Of each shape of tiles that loops keep in shared memory, the most copies.
    """

    registers: int
    stack: int
    shared: int
    opcodes: list[str]
    buffers: dict[tuple[int, ...], int]

    def count(self, *names: str) -> int:
        found = Counter(code.split(".")[0] for code in self.opcodes)
        return sum(found[name] for name in names)

    def narrow(self, name: str) -> int:
        """Loads or stores of fewer than 16 bytes."""
        return sum(code.split(".")[0] == name and ".128" not in code for code in self.opcodes)

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.count("LDL", "STL"))

    def in_order(self, *patterns: str) -> bool:
        """Whether instructions of these kinds follow one another, the last of each before the first of the next."""
        places = [[at for at, code in enumerate(self.opcodes) if re.match(each, code)] for each in patterns]
        return all(places) and all(max(one) < min(other) for one, other in zip(places, places[1:]))


def read(made, instructions: bool = True) -> Artefact:
    """Of a kernel that Triton has compiled; without its instructions it is read sooner."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _dump("--dump-resource-usage", file.name)
        code = _dump("-sass", file.name) if instructions else ""
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code, re.MULTILINE)
    buffers: dict[tuple[int, ...], int] = {}
    for sizes in re.findall(r"memdesc<(\d+x\d+x\d+)x", made.asm["ttgir"]):
        copies, *shape = map(int, sizes.split("x"))
        buffers[tuple(shape)] = max(copies, buffers.get(tuple(shape), 0))
    return Artefact(registers, stack, made.metadata.shared, lines, buffers)


def _dump(option: str, path: str) -> str:
    done = subprocess.run([knobs.nvidia.cuobjdump.path, option, path], capture_output=True, text=True, check=True)
    return done.stdout
