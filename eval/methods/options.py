"""What ``scout-hf bench methods`` takes; None and 0 leave a value to ``run``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from scout_hf.eval.options import BlockSize, Budget, CpuGbps, Drift, LinkGbps, Seed

Several = list[str] | None


@dataclass(frozen=True)
class Methods:
    """Every method, scout's ablations and stock caches: speed, memory, link, and answers from the same run."""

    contexts: Annotated[list[int] | None, Option(help="Tokens in the cache; several times. 8k, 16k, 32k.")] = None
    batches: Annotated[list[int] | None, Option(help="Rows; several times. 4.")] = None
    way: Annotated[Several, Option("--way", "--methods", help="Such as 'scout' or 'stock,dense'; several times.")] = (
        None
    )
    budget: Budget = 2048
    block_size: BlockSize = 32
    shape: Annotated[
        str, Option("--shape", "--local-model", help="gqa, mha, llama-3-8b, qwen3-14b, or a model's folder.")
    ] = "gqa"
    layers: Annotated[int | None, Option(min=1, help="Of a model with random weights; 4.")] = None
    device: Annotated[str, Option(help="Of that model: cpu, where both tiers are in host memory, or cuda.")] = "cpu"
    memory_gib: Annotated[
        list[float] | None, Option(help="Also as many rows as so much memory of the device takes; several times.")
    ] = None
    task: Annotated[Several, Option(help="Of the trained model; several times. needle, values.")] = None
    model: Annotated[str, Option(help="The trained model that is asked: llama or qwen3.")] = "llama"
    questions: Annotated[int | None, Option(min=1, help="Per task; 32.")] = None
    emulate: Annotated[str | None, Option(help="'paper': link and CPU in the proportions of its machine.")] = None
    link_gbps: LinkGbps = None
    cpu_gbps: CpuGbps = None
    drift: Drift = 0.1
    kvpress_python: Annotated[
        str | None, Option(help="A Python interpreter with kvpress, which needs another release of transformers.")
    ] = None
    threads: Annotated[int, Option(min=1, help="For the model, and as many for the CPU's share.")] = 1
    quick: Annotated[bool, Option("--quick", help="A small grid: a look, in about a minute.")] = False
    seed: Seed = 0
    fresh: Annotated[bool, Option("--fresh", help="Measure again what DIR/methods.json has.")] = False
    out: Annotated[Path | None, Option(help="Folder for JSON and plots; interrupted runs resume from it.")] = None

    def measure(self, command: str, tell: Callable[[str], Any]) -> dict[str, Any]:
        """The record of the benchmark, resumed from ``out``; ``command`` is kept in it."""
        from scout_hf.eval.methods.run import run

        return run(self, command=command, tell=tell)
