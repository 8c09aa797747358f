"""What ``scout-hf families`` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from typer import Option


@dataclass(frozen=True)
class Families:
    """Which types of causal language models are served, by the record of the installed transformers.

    With --check a tiny random model of each type is built, patched, decoded on one tier and on two, and compared with
    stock. Fails if a type is wrong, or is no longer served though the record has it.
    """

    check: Annotated[bool, Option("--check", help="Try them, on this machine.")] = False
    type: Annotated[list[str], Option(help="Only this model type; may be repeated.")] = field(default_factory=list)
    jobs: Annotated[int | None, Option(min=1, help="Processes; one per CPU.")] = None
    out: Annotated[Path | None, Option(help="Folder for the record of this check, such as 5.24.0.json.")] = None
    page: Annotated[Path | None, Option(help="Page whose table to update, from the records of all versions.")] = None
