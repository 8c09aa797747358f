"""``scout-hf demo``: which model is asked."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console

from scout_hf.errors import ConfigError, ScoutError
from scout_hf.eval.demo import pocket, real
from scout_hf.eval.demo.text import Document, read_document
from scout_hf.eval.language.load import load
from scout_hf.eval.language.packaged import PACKAGED, fetched
from scout_hf.eval.options import Demo

MODEL = "smollm2-135m"
NAME = PACKAGED[MODEL].about.partition(",")[0]
POCKET = "The demo goes on with a pocket model of one million parameters."


def run(options: Demo, console: Console | None = None) -> bool:
    """Run the demo and print it; True if the exact mode answered everything as stock attention did.

    Raises ConfigError for a wrong setting, before a model is fetched.
    """
    console = console or Console()
    configs = real.configs_of(options)
    refuse_in_vain(options)
    found = None if options.pocket else _real_model(options, console)
    if found is None:
        return pocket.run(options, console)
    return real.run(NAME, *found, configs, options, console)


def refuse_in_vain(options: Demo) -> None:
    """Raise ConfigError for options that would be ignored."""
    if options.budget is not None and any(one.partition("=")[0].strip() == "budget" for one in options.set):
        raise ConfigError("--budget and --set budget are both given: leave one out")
    given = {"--tokens": options.tokens, "--block-size": options.block_size, "--seed": options.seed}
    unused = [] if options.pocket else [f"{name} {value}" for name, value in given.items() if value is not None]
    if unused:
        raise ConfigError(
            f"{', '.join(unused)} is of the pocket model: add --pocket, or leave it out (--set takes block_size)"
        )


def _real_model(options: Demo, console: Console) -> tuple[Any, Any, Document] | None:
    """Model, tokenizer and document; None, and a sentence that says why, where one of them cannot be had."""

    def tell(line: object) -> None:
        console.print(line, style="dim", highlight=False, markup=False)

    def ask(question: str) -> bool:
        if options.yes or not sys.stdin.isatty():
            return options.yes
        return console.input(f"{question} [y/N] ", markup=False).strip().lower() in ("y", "yes")

    try:
        document = read_document()
        folder = fetched(MODEL, ask, tell)
        if folder is not None:
            return *load(str(folder)), document
        tell(f"{MODEL} was not fetched; --yes fetches it. {POCKET}")
    except ScoutError as error:
        tell(f"{MODEL} cannot be had ({error}). {POCKET}")
    return None
