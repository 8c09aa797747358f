"""Rates for an emulated link and CPU, in the proportions of the paper's machine."""

from __future__ import annotations

import time

import torch

from scout_hf.eval.methods.speed import Emulation
from scout_hf.kernels import attend

GPU_TO_CPU = 20.0
"""Attention on the paper's GPU against its CPU of 36 cores."""

CPU_TO_LINK = 100.0 / 15.0
"""That CPU's attention in GB/s of KV against PCIe 4.0 in pages of 32 tokens."""


def emulation_of(
    emulate: str | None, link_gbps: float | None, cpu_gbps: float | None, block_size: int
) -> tuple[Emulation, str]:
    """The rates, and how they came about in words.

    ``paper``: this machine's own attention on the calling thread stands for the GPU, link and CPU are as much slower as
    on the paper's machine.
    """
    if emulate is None:
        given = Emulation(link_gbps, cpu_gbps)
        return given, "as given" if given.options() else "nothing is emulated"
    if emulate != "paper":
        raise ValueError(f"--emulate {emulate} is not known; allowed is 'paper', or --link-gbps and --cpu-gbps by hand")
    if link_gbps is not None or cpu_gbps is not None:
        raise ValueError("--emulate paper sets both rates; leave it out to give --link-gbps and --cpu-gbps by hand")
    rate = device_gbps()
    cpu = round(rate / GPU_TO_CPU, 3)
    return Emulation(round(cpu / CPU_TO_LINK, 4), cpu), (
        "in the paper's proportions: attention of this machine's torch stands for the GPU, the CPU attends "
        f"{GPU_TO_CPU:.0f} times slower, the link is {CPU_TO_LINK:.1f} times slower again"
    )


def device_gbps(tokens: int = 8192, repeat: int = 9) -> float:
    """GB/s of KV that torch attends here, one row, 32 query and 8 KV heads of 64 in bf16; the median."""
    keys, values = (torch.randn(1, 8, tokens, 64).to(torch.bfloat16) for _ in range(2))
    query, taken = torch.randn(1, 32, 1, 64).to(torch.bfloat16), []
    for _ in range(repeat):
        begin = time.perf_counter()
        attend(query, keys, values, 0.125)
        taken.append(time.perf_counter() - begin)
    return 2 * keys.nbytes / sorted(taken)[repeat // 2] / 1e9
