"""What ``scout-hf read`` and ``scout-hf ask`` take. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Model = Annotated[
    str,
    Argument(metavar="MODEL", help="A folder, a GGUF file, a name of the hub, or a packaged model: smollm2-135m."),
]
Store = Annotated[
    Path | None,
    Option(metavar="DIR", help="Folder of the store; by default in the cache folder of scout_hf (SCOUT_HF_CACHE)."),
]
Limit = Annotated[str | None, Option(metavar="SIZE", help="Of the store, such as 20GiB; 32GiB by default.")]
Set = Annotated[list[str], Option(help="Any setting of patch(), as in block_size=64; may be repeated.")]
Dtype = Annotated[str | None, Option(help="Such as bfloat16; float32 on a CPU by default, bfloat16 on a GPU.")]
Device = Annotated[str, Option(help="Where the model runs: auto, cpu, cuda, cuda:1.")]
Threads = Annotated[int | None, Option(min=1, help="Of torch; as many as it takes by itself.")]
Yes = Annotated[bool, Option("--yes", help="Fetch a packaged model without asking.")]
Plain = Annotated[bool, Option("--plain", help="Without the chat template of the model.")]
Tokens = Annotated[int | None, Option(min=1, help="Only so many tokens of each text, from its beginning.")]


@dataclass(frozen=True)
class Read:
    """Read texts ahead of their questions: keys and values are kept on disk, where `scout-hf ask` finds them.

    May be interrupted at any time: the same command goes on from there.
    """

    model: Model
    texts: Annotated[list[Path], Argument(metavar="TEXT...", help="Files in UTF-8; - is the standard input.")]
    store: Store = None
    store_limit: Limit = None
    together: Annotated[bool, Option("--together", help="All files are one text, in this order.")] = False
    name: Annotated[str | None, Option(help="Of the text, for `ask --text`; that of its file by default.")] = None
    tokens: Tokens = None
    plain: Plain = False
    unlisted: Annotated[
        bool, Option("--unlisted", help="Keep no token ids: `ask` needs the file again, with --text.")
    ] = False
    set: Set = field(default_factory=list)
    dtype: Dtype = None
    device: Device = "auto"
    threads: Threads = None
    yes: Yes = False


@dataclass(frozen=True)
class Ask:
    """Answer questions about a text, which is read only where the store does not have it yet."""

    model: Model
    questions: Annotated[list[str], Argument(metavar="QUESTION...", help="Each is answered from the text alone.")]
    text: Annotated[
        str | None, Option(help="A file, or the name of a text that was read; by default the one read last.")
    ] = None
    store: Store = None
    store_limit: Limit = None
    new_tokens: Annotated[int, Option(min=1, help="Most tokens of an answer.")] = 256
    sample: Annotated[bool, Option("--sample", help="Sample answers; else the likeliest token is taken.")] = False
    tokens: Tokens = None
    plain: Plain = False
    set: Set = field(default_factory=list)
    dtype: Dtype = None
    device: Device = "auto"
    threads: Threads = None
    yes: Yes = False
