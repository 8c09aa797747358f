"""What ``scout-hf batch`` takes. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from scout_hf.eval.ask.options import Device, Dtype, Limit, Model, Plain, Set, Store, Threads, Yes


@dataclass(frozen=True)
class Batch:
    """Answer the prompts of a file; what several of them begin with is read once, and kept in the store.

    May be interrupted or killed at any time: the same command goes on from there. Ends with code 1 if a row failed.
    """

    model: Model
    source: Annotated[Path, Argument(metavar="IN", help="JSON Lines or Parquet: a prompt or messages in each row.")]
    out: Annotated[Path, Argument(metavar="OUT", help="JSON Lines or Parquet; appears when all rows are done.")]
    new_tokens: Annotated[int, Option(min=1, help="Most tokens of an answer.")] = 256
    sample: Annotated[bool, Option("--sample", help="Sample answers; else the likeliest token is taken.")] = False
    seed: Annotated[int, Option(min=0, help="Of sampling; each row has its own random numbers.")] = 0
    generate: Annotated[
        list[str], Option(help="Any argument of generate(), as in temperature=0.7; may be repeated.")
    ] = field(default_factory=list)
    plain: Plain = False
    retry_failed: Annotated[bool, Option("--retry-failed", help="Answer rows again that have an error.")] = False
    ray: Annotated[
        int | None,
        Option(min=1, metavar="WORKERS", help="On a Ray cluster: that of RAY_ADDRESS, else a new one on this machine."),
    ] = None
    cpus: Annotated[float, Option(min=0, help="Of each worker on Ray.")] = 1
    gpus: Annotated[float, Option(min=0, help="Of each worker on Ray.")] = 0
    store: Store = None
    store_limit: Limit = None
    no_store: Annotated[bool, Option("--no-store", help="Read every prompt from its first token.")] = False
    keep_all: Annotated[
        bool, Option("--keep-all", help="Keep whole prompts, not only what several of them begin with.")
    ] = False
    set: Set = field(default_factory=list)
    dtype: Dtype = None
    device: Device = "auto"
    threads: Threads = None
    yes: Yes = False
