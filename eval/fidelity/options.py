"""What ``scout-hf fidelity`` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from typer import Option

from scout_hf.eval.options import Seed


@dataclass(frozen=True)
class Fidelity:
    """Accuracy and perplexity lost to selection and to the predicted query: budgets, blocks, digests, contexts."""

    quick: Annotated[bool, Option("--quick/--full", help="Minutes, or the whole study.")] = True
    only: Annotated[list[str], Option(help="Part of it, as in mode=real,predicted; may be repeated.")] = field(
        default_factory=list
    )
    out: Annotated[Path, Option(help="Folder for results; interrupted runs resume from it.")] = Path("fidelity")
    jobs: Annotated[int | None, Option(min=1, help="Processes, one thread each; as many as cores.")] = None
    questions: Annotated[int | None, Option(min=1, help="Per cell; 32 or 48 by default.")] = None
    seed: Seed = 0
    fresh: Annotated[bool, Option("--fresh", help="Measure everything again.")] = False
    report: Annotated[Path | None, Option(help="Measure nothing: show this fidelity.json.")] = None
    readme: Annotated[Path | None, Option(help="Page whose table of results to update.")] = None
