"""What the benchmarks of kernels and of decode steps take, and how they are measured by it.

Nothing heavy is imported before that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from scout_hf.eval.options import BlockSize, Budget, Cpus, Drift

Out = Annotated[Path | None, Option(help="Folder for the numbers as JSON, and a plot.")]
Repeat = Annotated[int, Option(min=3, help="Timed calls of each kind, in random order.")]

Tell = Callable[[str], Any]
"""Receives progress messages, one line each."""


@dataclass(frozen=True)
class CpuKernel:
    """Attention over scattered blocks beside bare reads of the same memory, torch, and int8; takes two minutes."""

    tokens: Annotated[list[int], Option(help="Selected tokens; may be given several times.")] = field(
        default_factory=lambda: [1024, 4096, 16384, 65536]
    )
    cache_tokens: Annotated[int, Option(help="Tokens that they are scattered over.")] = 131072
    heads: Annotated[tuple[int, int], Option(help="Query heads and KV heads.")] = (32, 8)
    head_dim: Annotated[int, Option(help="Size of a head.")] = 128
    block_size: BlockSize = 32
    threads: Annotated[int, Option(min=1, help="CPUs to use.")] = 1
    repeat: Repeat = 30
    dense: Annotated[int, Option(min=0, help="Calls of torch over the whole cache; slow.")] = 3
    out: Out = None

    def measure(self, tell: Tell) -> dict[str, Any]:
        """The record of the benchmark."""
        from scout_hf.eval.bench.cpu_kernel import run

        return run(self, tell)


@dataclass(frozen=True)
class CpuDecode:
    """Steps of a model shaped like Llama 3.2 1B, stock and patched, with long caches; takes several minutes."""

    contexts: Annotated[list[int], Option(min=0, help="Tokens in the cache; may be given several times.")] = field(
        default_factory=lambda: [0, 32768, 131072]
    )
    budget: Budget = 2048
    block_size: BlockSize = 32
    threads: Cpus = None
    repeat: Repeat = 20
    layers: Annotated[int, Option(min=1, help="Of the model; fewer take less time and memory.")] = 16
    batch: Annotated[int, Option(min=1, help="Rows of every cache.")] = 1
    prefill_tokens: Annotated[int, Option(min=0, help="Length of the prompt to read; 0 for none.")] = 8192
    prefill_layers: Annotated[int, Option(min=1, help="That read it; the cost per layer is the same.")] = 2
    memory_tokens: Annotated[int, Option(min=0, help="Context to measure memory for; 0 for none.")] = 32768
    out: Out = None

    def measure(self, tell: Tell) -> dict[str, Any]:
        """The record of the benchmark."""
        from scout_hf.eval.bench.cpu_decode import run

        return run(self, tell)


@dataclass(frozen=True)
class Gpu:
    """Everything about a GPU in a given time: rates, checks, tests, kernels, decode steps beside fast full attention.

    Stages run in processes of their own. What is known is in DIR/gpu.json after every cell, and as a table in
    DIR/gpu.txt. Send these and DIR/logs with whatever you found.
    """

    seconds: Annotated[int, Option(min=10, help="It ends by itself before; about 660 suffice for everything.")] = 660
    out: Annotated[Path, Option(metavar="DIR", help="Folder for results and logs.")] = Path("gpu-results")
    begin: Annotated[
        str | None,
        Option("--from", metavar="STAGE", help="Go on there; stages before it run last, if they had no time."),
    ] = None
    device: Annotated[str, Option(help="A GPU: cuda, cuda:1; cpu rehearses it with a tiny model.")] = "cuda"
    layers: Annotated[int | None, Option(min=1, help="Cut the model to so many; figures say so.")] = None
    budget: Budget = 2048
    digest: Annotated[str, Option(help="Digest whose scores are computed; auto as in ScoutConfig.")] = "auto"
    drift: Drift = 0.1
    seed: Annotated[int, Option(help="Decides weights, keys and values.")] = 0


@dataclass(frozen=True)
class Sessions:
    """Saving and opening caches, and decoding from files, beside bare reads and writes; takes three minutes."""

    context: Annotated[int, Option(min=1, help="Tokens of the session that is saved and opened.")] = 32768
    limited: Annotated[int, Option(min=0, help="Tokens decoded under a limit of memory; 0 for none.")] = 65536
    share: Annotated[float, Option(min=0.01, max=1, help="The limit: this part of their KV.")] = 0.25
    question: Annotated[int, Option(min=0, help="Tokens of a question after opening; 0 for none.")] = 8
    budget: Budget = 2048
    block_size: BlockSize = 32
    threads: Cpus = None
    repeat: Annotated[int, Option(min=3, help="Rounds, each with all arms in random order.")] = 5
    steps: Annotated[int, Option(min=2, help="Decode steps of each arm in a round.")] = 6
    layers: Annotated[int, Option(min=1, help="Of the model; fewer take less time and memory.")] = 16
    folder: Annotated[Path | None, Option(help="On the disk to measure; that for temporary files by default.")] = None
    out: Out = None

    def measure(self, tell: Tell) -> dict[str, Any]:
        """The record of the benchmark."""
        from scout_hf.eval.bench.sessions import run

        return run(self, tell)


@dataclass(frozen=True)
class Rivals:
    """A real model, stock, with scout_hf, in llama.cpp and in OpenVINO, reading and decoding; takes many minutes.

    llama.cpp comes with llama-cpp-python, OpenVINO with openvino-genai; what is not installed is left out, and said.
    """

    model: Annotated[str, Argument(help="A packaged model, a folder, a GGUF file, a name of the hub.")] = "smollm2-135m"
    contexts: Annotated[list[int], Option(min=0, help="Tokens in the cache; may be given several times.")] = field(
        default_factory=lambda: [0, 4096, 16384, 32768]
    )
    prefill: Annotated[
        int, Option(min=8, help="Tokens to read; longer caches are filled with repeats, where a runtime takes them.")
    ] = 4096
    weights: Annotated[
        list[str], Option(help="Of transformers' arms: float32, bfloat16, 'torch int8'; several times.")
    ] = field(default_factory=lambda: ["float32"])
    arm: Annotated[list[str] | None, Option(help="Whose names begin so, such as 'scout' or 'llama.cpp'; all.")] = None
    gguf: Annotated[list[Path], Option(help="The same weights for the others; of a packaged model its own.")] = field(
        default_factory=list
    )
    f16: Annotated[bool, Option("--f16", help="llama.cpp also with weights in F16, made from the GGUF file.")] = False
    openvino: Annotated[Path | None, Option(help="Folder with the model as OpenVINO has it, not the GGUF.")] = None
    rivals_python: Annotated[str | None, Option(help="Python that has the others; this one by default.")] = None
    budget: Budget = 2048
    block_size: BlockSize = 32
    threads: Cpus = None
    rounds: Annotated[int, Option(min=1, help="Each with all arms in random order.")] = 3
    steps: Annotated[int, Option(min=1, help="Timed steps of each arm in a round; slow arms take fewer.")] = 8
    yes: Annotated[bool, Option("--yes", help="Fetch a packaged model without asking.")] = False
    quick: Annotated[bool, Option("--quick", help="None and 8k tokens, few steps: a look.")] = False
    out: Out = None

    def measure(self, tell: Tell) -> dict[str, Any]:
        """The record of the benchmark, with those of other models that ``out`` has."""
        from scout_hf.eval.bench.rivals import run

        return run(self, tell)


@dataclass(frozen=True)
class Drafts:
    """Lossless drafts of a real model over an emulated link, beside exact and sparse steps; takes many minutes."""

    model: Annotated[str, Argument(help="A packaged model, a folder, a GGUF file, a name of the hub.")] = "smollm2-135m"
    context: Annotated[int, Option(min=2, help="Tokens of the text before what is decoded.")] = 16384
    budget: Annotated[int, Option(min=1, help="Tokens that drafts and sparse steps attend to.")] = 2048
    most: Annotated[int, Option(min=1, help="Tokens that are drafted before a check, at most.")] = 16
    new: Annotated[int, Option(min=16, help="Tokens that arms decode.")] = 80
    exact_new: Annotated[int, Option(min=2, help="Timed tokens of arms that cross the link at every token.")] = 8
    share: Annotated[float, Option(min=1e-6, help="Rate of the link, as a part of what memory reads.")] = 1 / 50
    rounds: Annotated[int, Option(min=1, help="Each with all arms in random order.")] = 1
    text: Annotated[list[Path], Option(help="To be continued; several times. Own sources by default.")] = field(
        default_factory=list
    )
    session: Annotated[Path | None, Option(help="Where the prompt is kept, so that later runs need not read it.")] = (
        None
    )
    threads: Cpus = None
    yes: Annotated[bool, Option("--yes", help="Fetch a packaged model without asking.")] = False
    out: Out = None

    def measure(self, tell: Tell) -> dict[str, Any]:
        """The record of the benchmark."""
        from scout_hf.eval.bench.drafts import run

        return run(self, tell)


def all_but(options: Any, *names: str) -> dict[str, Any]:
    """Options by name, as a record keeps them, without some."""
    return {name: value for name, value in asdict(options).items() if name not in names}


def check_sizes(heads: Iterable[tuple[int, int]], block_size: int, lengths: Iterable[int]) -> None:
    """ValueError unless KV heads divide query heads, and all lengths are whole numbers of blocks."""
    for query_heads, kv_heads in heads:
        if kv_heads < 1 or query_heads < 1 or query_heads % kv_heads:
            raise ValueError(f"--heads {query_heads}/{kv_heads}: query heads must be a multiple of KV heads; try 32/8")
    for tokens in lengths:
        if tokens < block_size or tokens % block_size:
            near = -(-max(1, tokens) // block_size) * block_size
            raise ValueError(f"{tokens} tokens are no whole number of blocks of {block_size}; try {near}")


def silent(line: str) -> None:
    """Tells nobody."""
