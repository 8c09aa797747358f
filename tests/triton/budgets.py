"""What compiled kernels may take on a GPU of compute capability 9.0: a step above what they take."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import dropwhile, groupby

from tests.triton.artefacts import Artefact

REGISTERS = {
    "attend residents, another tile": 168,
    "choose, padded": 160,  # with triton 3.6; there is one program per row and KV head
    "score sign2": 168,
    "encode sign": 192,
    "encode sign2": 255,
}
MOST_REGISTERS = 128
"""Of all others: as many as 4 blocks of 4 warps may have on a multiprocessor."""

PIPELINED = ("attend residents", "attend residents, padded", "attend tail", "attend tail, padded")
WIDE = (*PIPELINED, "copy", "post", "adopt", "move", "merge", "merge the CPU's share", "encode minmax", "score minmax")
WIDE += ("norm", "norm, shifted", "gate")
"""Their data comes by 16 bytes; lists and masks need not."""

RELEASED = (r"ST(?!.*STRONG\.SYS)", r"MEMBAR.*SYS", r"ST.*STRONG\.SYS")
"""Data, a fence for the whole system, a flag."""


def excesses(name: str, made: Artefact) -> Iterator[str]:
    """What is wrong with a kernel at one of the shapes, in words."""
    if made.spills:
        yield f"stack of {made.stack} bytes, {made.count('LDL', 'STL')} local loads and stores"
    if made.registers > (limit := REGISTERS.get(name, MOST_REGISTERS)):
        yield f"{made.registers} registers, allowed are {limit}"
    if name in PIPELINED and made.buffers.get((64, 128), 0) < 2:
        yield f"tiles of keys and values are not in two buffers: {made.buffers}"
    if name in WIDE and not any(".128" in code for code in made.opcodes if code.startswith("LDG")):
        yield "no load of 16 bytes"
    if name in ("copy", "adopt", "move") and made.narrow("STG") > (0 if name == "copy" else 2):
        yield f"{made.narrow('STG')} stores of fewer than 16 bytes"
    if name.startswith("choose") and (wide := sum(".EX" in code for code in made.opcodes)) > 4:
        yield f"{wide} comparisons of 64 bits"
    if name == "post" and not made.in_order(*RELEASED):
        yield "the flag is not set after a fence after the data"
    if name == "post" and (fences := made.count("MEMBAR")) > 1:
        yield f"{fences} fences, one is enough"
    if name in ("copy", "post") and (rounds := _rounds(made.opcodes)) > 1:
        yield f"data is loaded in {rounds} rounds, each after the stores of the one before"
    if name == "plan" and (late := _loads_behind_sums(made.opcodes)) > 1:
        yield f"{late} loads wait for sums over threads, only that of missing blocks must"
    if name == "wait" and not any("STRONG.SYS" in code for code in made.opcodes if code.startswith("LD")):
        yield "the flag is not read by an acquiring load"


def _rounds(opcodes: list[str]) -> int:
    """Runs of wide loads with stores between them."""
    wide = (code[:3] for code in opcodes if code.startswith(("LDG", "STG")) and ".128" in code)
    return sum(kind == "LDG" for kind, _ in groupby(wide))


def _loads_behind_sums(opcodes: list[str]) -> int:
    return sum(code.startswith("LDG") for code in dropwhile(lambda code: not code.startswith("BAR"), opcodes))
