"""What commands take: options that several share, and those of commands whose own rooms import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Seed = Annotated[int, Option(help="Decides documents and questions.")]
Threads = Annotated[int, Option(min=1, help="Of torch; more than the free cores slow a small model down.")]
Cpus = Annotated[int | None, Option(min=1, help="CPUs to use; as many as torch takes by itself.")]
Budget = Annotated[int, Option(help="Tokens attended per step and layer.")]
BlockSize = Annotated[int, Option(help="Tokens per block.")]
Drift = Annotated[float, Option(min=0, help="Share of the chosen blocks that changes per step.")]
LinkGbps = Annotated[float | None, Option(help="Emulated link, GB/s of KV.")]
CpuGbps = Annotated[float | None, Option(help="Emulated CPU, GB/s of KV.")]


@dataclass(frozen=True)
class Demo:
    """Ask questions about a long document: stock attention, exact, sparse. Fails if exact differs from stock.

    The model is SmolLM2-135M-Instruct, which arrives by pip, and the document is part of Python's reference.
    """

    yes: Annotated[bool, Option("--yes", help="Fetch the model (93 MB from PyPI, once) without asking.")] = False
    questions: Annotated[int | None, Option(min=1, help="How many hidden facts to ask for; all.")] = None
    budget: Annotated[int | None, Option(help="Tokens attended per step and layer when sparse; 2048.")] = None
    set: Annotated[list[str], Option(help="Any setting when sparse, as in mass=0.95; may be repeated.")] = field(
        default_factory=list
    )
    threads: Annotated[int | None, Option(min=1, help="Of torch; as many as there are CPUs, 8 at most.")] = None
    pocket: Annotated[bool, Option("--pocket", help="Ask a packaged model of one million parameters instead.")] = False
    tokens: Annotated[int | None, Option(min=256, help="Of the pocket model's document; 8192.")] = None
    block_size: Annotated[int | None, Option(help="Tokens per block, with the pocket model; 16.")] = None
    seed: Annotated[int | None, Option(help="Decides the pocket model's document and questions; 0.")] = None


@dataclass(frozen=True)
class Fidelity:
    """What sparse decoding of a model loses on a text: log-probability of right answers, KL from full attention.

    Facts are hidden in the text and asked for, passages begun again, records written down. Without --model: the
    packaged smollm2-135m, or, where it cannot be had, a pocket model.
    """

    model: Annotated[
        str | None,
        Option(help="A folder, a GGUF file, a name of the hub, or a packaged model, such as smollm2-135m."),
    ] = None
    text: Annotated[list[Path], Option(help="Text files; the reference of Python by default.")] = field(
        default_factory=list
    )
    tokens: Annotated[str, Option(help="Lengths of documents, such as 4096,8192.")] = "4096"
    budget: Annotated[str, Option(help="Tokens or shares, such as 512,0.06,none.")] = "512,1024"
    digest: Annotated[str, Option(help="Digests, such as sign,minmax.")] = "auto"
    split: Annotated[str, Option(help="One tier (off), two (cpu), or off,cpu.")] = "off"
    cpu_query: Annotated[str, Option(help="On two tiers: such as auto,predicted,real.")] = "auto"
    set: Annotated[list[str], Option(help="Any setting, as in block_size=16,32; may be repeated.")] = field(
        default_factory=list
    )
    documents: Annotated[int | None, Option(min=1, help="Of each length; 1 or 4 by default.")] = None
    layers: Annotated[bool, Option("--layers", help="Show a table by layer, too.")] = False
    threads: Annotated[int | None, Option(min=1, help="Of torch; as many as it takes by itself.")] = None
    yes: Annotated[bool, Option("--yes", help="Fetch a packaged model without asking.")] = False
    quick: Annotated[bool, Option("--quick/--full", help="One document of each length, or four.")] = True
    out: Annotated[Path, Option(help="Folder for results; interrupted runs resume from it.")] = Path("fidelity")
    questions: Annotated[int | None, Option(min=1, help="Of each task and document; 4 or 8 by default.")] = None
    seed: Seed = 0
    fresh: Annotated[bool, Option("--fresh", help="Measure everything again.")] = False
    report: Annotated[Path | None, Option(help="Measure nothing: show this fidelity.json.")] = None
    readme: Annotated[Path | None, Option(help="Page whose table of results to update.")] = None


@dataclass(frozen=True)
class Serve:
    """Serve a patched model to OpenAI clients: transformers' own server, as `transformers serve` runs it.

    Chat completions, responses and completions, whole or streamed, at http://HOST:PORT/v1; statistics at /stats.
    """

    model: Annotated[
        str,
        Argument(metavar="MODEL", help="A folder, a name of the hub, or a packaged model, such as smollm2-135m."),
    ]
    budget: Annotated[str | None, Option(help="Tokens (512) or share (0.06) attended per step and layer, or none.")] = (
        None
    )
    split: Annotated[str | None, Option(help="One tier (off), two (auto, cpu).")] = None
    set: Annotated[list[str], Option(help="Any setting of patch(), as in mass=0.95; may be repeated.")] = field(
        default_factory=list
    )
    store: Annotated[
        Path | None, Option(metavar="DIR", help="Keep what was read here, and read only what is new; made if missing.")
    ] = None
    store_limit: Annotated[str | None, Option(help="Bytes of the store, such as 20GiB; 32GiB by default.")] = None
    host: Annotated[str, Option(help="Address to listen at; 0.0.0.0 takes requests of other machines, too.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")] = 8000
    device: Annotated[str, Option(help="Where the model runs: auto, cpu, cuda, cuda:1.")] = "auto"
    dtype: Annotated[str | None, Option(help="Such as bfloat16, or auto: that of the weights; float32 on a CPU.")] = (
        None
    )
    threads: Annotated[int | None, Option(min=1, help="Of torch; as many as it takes by itself.")] = None
    yes: Annotated[bool, Option("--yes", help="Fetch a packaged model without asking.")] = False


@dataclass(frozen=True)
class Trace:
    """A timeline of decode steps for Perfetto and a picture: who does what, when, and who waits for whom."""

    out: Annotated[Path, Option(help="The timeline, ending in .json; a picture goes beside it.")] = Path("step.json")
    model: Annotated[str, Option(help="A pocket model, llama or qwen3, or the folder of a model.")] = "llama"
    context: Annotated[int, Option(min=256, help="Tokens that are read before.")] = 4096
    method: Annotated[str, Option(help="Such as 'scout' or 'dense'.")] = "scout"
    split: Annotated[str | None, Option(help="Of ScoutConfig; 'cpu' on a CPU, else 'auto'.")] = None
    cpu_query: Annotated[str | None, Option(help="Of scout; 'predicted'.")] = None
    budget: Annotated[int | None, Option(help="Tokens attended per layer; an eighth of the context.")] = None
    resident: Annotated[int | None, Option(help="Tokens kept on the device; half of the budget.")] = None
    link_gbps: LinkGbps = None
    cpu_gbps: CpuGbps = None
    steps: Annotated[int, Option(min=1, help="Decode steps to keep, the last ones.")] = 2
    device: Annotated[str, Option(help="Where the model runs: cpu, cuda, cuda:1.")] = "cpu"
    threads: Threads = 1
    seed: Seed = 0


@dataclass(frozen=True)
class Report:
    """One HTML page, without references to the network, of everything that was measured."""

    results: Annotated[list[Path], Argument(metavar="RESULTS", help="JSON files, or folders of them.")] = field(
        default_factory=lambda: [Path("eval/results")]
    )
    out: Annotated[Path, Option(help="The page to write.")] = Path("report.html")


@dataclass(frozen=True)
class MakeData:
    """Write small data sets in LongBench's format for the pocket model, to be used with --longbench-dir."""

    folder: Annotated[Path, Argument(metavar="DIR", help="Made if it does not exist.")]
    rows: Annotated[int, Option(min=1, help="Per data set.")] = 20
    tokens: Annotated[int, Option(min=256, help="Length of the longest document.")] = 1024
    seed: Seed = 0
