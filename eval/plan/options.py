"""What ``scout-hf plan`` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from scout_hf.eval.options import BlockSize

MODELS = (
    "llama-2-7b, llama-3.2-1b, llama-3-8b, llama-3-70b, qwen3-8b, qwen3-14b, qwen3-32b, smollm2-135m, gemma3-270m, "
    "qwen2.5-coder-0.5b"
)
GPUS = "h200, h100, a100-80, a100-40, l40s, rtx-5090, rtx-4090, rtx-3090"


@dataclass(frozen=True)
class Plan:
    """Will it fit, will it pay: memory, step time and break-even of every method, on machines one does not have.

    Estimates by arithmetic from sizes and bandwidths; nothing runs on a GPU. `scout-hf bench` measures.
    """

    model: Annotated[str, Option(help=f"{MODELS}; or a config.json, or its folder.")] = "llama-3-8b"
    gpu: Annotated[str, Option(help=f"{GPUS}; --machine for others.")] = "h100"
    context: Annotated[int, Option(min=1, help="Tokens.")] = 65536
    batch: Annotated[int, Option(min=1, help="Rows.")] = 8
    budget: Annotated[int, Option(min=1, help="Tokens attended per step and layer.")] = 2048
    block_size: BlockSize = 32
    link: Annotated[float | None, Option(help="Host to device, GB/s.")] = None
    dram: Annotated[float | None, Option(help="GB/s of KV that the CPU attends.")] = None
    device_gib: Annotated[float | None, Option(help="Memory of the GPU.")] = None
    host_gib: Annotated[float | None, Option(help="Memory of the host.")] = None
    layer_us: Annotated[float | None, Option(help="Launches per layer, in microseconds; 20 in one graph.")] = None
    cpu_ratio: Annotated[float, Option(min=0, max=1, help="CPU's share of scout's chosen blocks.")] = 0.1
    machine: Annotated[Path | None, Option(help="Constants that --measure wrote.")] = None
    measure: Annotated[bool, Option("--measure", help="Read the constants off this machine.")] = False
    check: Annotated[Path | None, Option(help="A benchmark's JSON to hold predictions against.")] = None
    out: Annotated[Path, Option(help="Where --measure writes.")] = Path("machine.json")
    threads: Annotated[int | None, Option(min=1, help="Of torch, for --measure.")] = None
