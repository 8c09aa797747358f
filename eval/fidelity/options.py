"""What ``scout-hf fidelity`` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from typer import Option

from scout_hf.eval.options import Seed


@dataclass(frozen=True)
class Fidelity:
    """What is lost to selection and to the predicted query: of your model on your text, or of the pocket models.

    With --model, any causal language model is asked about a text: log-probability of right answers, and divergence of
    the next token from full attention. Without, the pocket models are studied: budgets, blocks, digests, contexts.
    """

    model: Annotated[
        str | None,
        Option(help="A folder, a GGUF file, a name of the hub, or a packaged model, such as smollm2-135m."),
    ] = None
    text: Annotated[list[Path], Option(help="Of --model: text files; the reference of Python by default.")] = field(
        default_factory=list
    )
    tokens: Annotated[str, Option(help="Of --model: lengths of documents, such as 4096,8192.")] = "4096"
    budget: Annotated[str, Option(help="Of --model: tokens or shares, such as 512,0.06,none.")] = "512,1024"
    digest: Annotated[str, Option(help="Of --model: digests, such as sign,minmax.")] = "auto"
    split: Annotated[str, Option(help="Of --model: one tier (off), two (cpu), or off,cpu.")] = "off"
    cpu_query: Annotated[str, Option(help="Of --model, on two tiers: such as auto,predicted,real.")] = "auto"
    set: Annotated[list[str], Option(help="Of --model: any setting, as in block_size=16,32; may be repeated.")] = field(
        default_factory=list
    )
    documents: Annotated[int | None, Option(min=1, help="Of --model: of each length; 1 or 4 by default.")] = None
    layers: Annotated[bool, Option("--layers", help="Of --model: show a table by layer, too.")] = False
    threads: Annotated[int | None, Option(min=1, help="Of --model: of torch; as many as it takes by itself.")] = None
    yes: Annotated[bool, Option("--yes", help="Fetch a packaged model without asking.")] = False
    quick: Annotated[bool, Option("--quick/--full", help="Minutes, or the whole study.")] = True
    only: Annotated[list[str], Option(help="Part of it, as in mode=real,predicted; may be repeated.")] = field(
        default_factory=list
    )
    out: Annotated[Path, Option(help="Folder for results; interrupted runs resume from it.")] = Path("fidelity")
    jobs: Annotated[int | None, Option(min=1, help="Processes, one thread each; as many as cores.")] = None
    questions: Annotated[int | None, Option(min=1, help="Of each task and document; pocket models: per cell.")] = None
    seed: Seed = 0
    fresh: Annotated[bool, Option("--fresh", help="Measure everything again.")] = False
    report: Annotated[Path | None, Option(help="Measure nothing: show this fidelity.json.")] = None
    readme: Annotated[Path | None, Option(help="Page whose table of results to update.")] = None
