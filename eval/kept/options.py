"""What the commands of ``scout-hf session`` take. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from scout_hf.eval.ask.options import Store

Json = Annotated[bool, Option("--json", help="Print JSON, for scripts.")]


@dataclass(frozen=True)
class Ls:
    """List saved sessions, and the texts of stores: model, tokens, bytes, when they were made and used.

    A model is shown as it was named, else by its type, with the begin of a hash of its weights; `session info` has all.
    """

    paths: Annotated[
        list[Path], Argument(metavar="[PATH]...", help="Sessions, folders of sessions, stores; else the store alone.")
    ] = field(default_factory=list)
    store: Store = None
    json: Json = False


@dataclass(frozen=True)
class Info:
    """Tell everything about one session, one text of a store, or a store."""

    path: Annotated[str, Argument(metavar="PATH", help="A session, a store, or the name of a text in the store.")]
    store: Store = None
    tokenizer: Annotated[str | None, Option(metavar="MODEL", help="Show the begin of the text, by this model.")] = None
    check: Annotated[bool, Option("--check", help="Read all of it, and tell whether it is whole.")] = False
    json: Json = False


@dataclass(frozen=True)
class Rm:
    """Remove sessions, or texts of a store. What is neither is refused."""

    paths: Annotated[list[str], Argument(metavar="PATH...", help="Sessions, or names of texts in the store.")]
    store: Store = None
    yes: Annotated[bool, Option("--yes", help="Without asking.")] = False


@dataclass(frozen=True)
class Prune:
    """Bring a store within a limit: what was not used for longest leaves, and what killed processes left behind."""

    store: Store = None
    limit: Annotated[str | None, Option(metavar="SIZE", help="Such as 20GiB; 32GiB by default.")] = None
    json: Json = False
