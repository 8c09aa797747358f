"""How fast this machine reads memory: what no decode step can beat."""

from __future__ import annotations

from typing import Any

import torch

from scout_hf.diagnostics import MemoryReader, native_isa
from scout_hf.eval.bench.timing import interleave
from scout_hf.stores import allocate_slab

SPAN_BYTES = 1 << 30


def read_rate(threads: int, repeat: int) -> dict[str, Any]:
    """The machine's own sequential read rate on so many threads."""
    memory = allocate_slab((SPAN_BYTES,), torch.uint8, torch.device("cpu")).fill_(1)
    reader = MemoryReader(threads) if native_isa() else None
    numbers = memory.view(torch.int64)

    def read():
        return reader.span(memory) if reader else numbers.sum()

    read()
    timing = interleave({"read": lambda: read}, repeat)["read"]
    if reader:
        reader.close()
    return {"bytes": SPAN_BYTES, "by": "native" if reader else "torch.sum", **timing.record(SPAN_BYTES)}
