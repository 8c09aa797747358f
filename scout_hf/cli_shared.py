"""What commands share: paths that are looked at first, errors that end in one line, threads, a benchmark's record."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer


@contextmanager
def benchmark(
    out: Path | None, threads: int | None, goes_on: bool = False, device: str | None = None
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives what to call with the record of a benchmark; the rest as in ``evaluation``.

    ``goes_on``: what was measured is in ``out``, and the same command resumes.
    """
    with told():
        if out:
            out.mkdir(parents=True, exist_ok=True)
    with evaluation(threads, device):
        from scout_hf.eval.bench import report

        def finish(record: dict[str, Any]) -> None:
            report.show(record)
            for line in report.save(record, out) if out else ():
                typer.echo(line)

        try:
            yield finish
        except KeyboardInterrupt as error:
            kept = f"; {out} has what was measured, and the same command resumes from it" if out and goes_on else ""
            typer.echo(f"stopped{kept}", err=True)
            raise typer.Exit(130) from error


def typed() -> str:
    """The command as it was typed."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def tell(line: str) -> None:
    typer.echo(line, err=True)


def must_be_there(*files: Path | None) -> None:
    from scout_hf.errors import MissingFileError

    for path in files:
        if path and not path.is_file():
            raise MissingFileError(f"{path} is not there, or no file")


def must_lead_to_a_folder(option: str, value: str) -> None:
    """Of a name or a path, the path: names are looked at by whoever knows them."""
    from scout_hf.errors import MissingFileError

    if (os.sep in value or (os.altsep or os.sep) in value) and not Path(value, "config.json").is_file():
        raise MissingFileError(
            f"{option} {value} is not the folder of a model: {Path(value, 'config.json')} is missing"
        )


def must_run(option: str, program: str | None) -> None:
    from scout_hf.errors import MissingFileError

    if program and not shutil.which(program):
        raise MissingFileError(f"{option} {program} is not there, or cannot be run")


@contextmanager
def told() -> Iterator[None]:
    """A wrong setting or file ends in its message and exit code 2, not in a traceback."""
    from scout_hf.errors import ScoutError

    try:
        yield
    except BrokenPipeError:
        # Whoever reads has seen enough, as head does: typer ends without a word.
        raise
    except (ScoutError, OSError, ValueError) as error:
        tell(f"error: {error}")
        raise typer.Exit(2) from error


@contextmanager
def evaluation(threads: int | None, device: str | None = None) -> Iterator[None]:
    """The same, with so many torch threads; ``device``: one that must be there."""
    with told():
        import torch

        if device:
            from scout_hf.eval.bench.device import find

            find(device)
        from transformers.utils import logging

        logging.disable_progress_bar()
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)
