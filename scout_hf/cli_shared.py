"""What commands share: checks of paths, errors in one line, the number of threads, the record of a benchmark."""

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
    out: Path | None, threads: int | None, resumes: bool = False, device: str | None = None
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """As ``evaluation``; yields a function that prints the record of a benchmark and saves it in ``out``.

    ``resumes``: the benchmark saves results in ``out`` as it runs, and the same command resumes an interrupted run.
    """
    with exits_on_errors():
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
            kept = f"; {out} has the results so far, and the same command resumes from them" if out and resumes else ""
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
            raise MissingFileError(f"{path} is missing, or is not a file")


def must_lead_to_a_folder(option: str, value: str) -> None:
    """Check a value that is a name or a path, if it is a path: it must be a folder with a config.json."""
    from scout_hf.errors import MissingFileError

    if (os.sep in value or (os.altsep or os.sep) in value) and not Path(value, "config.json").is_file():
        raise MissingFileError(
            f"{option} {value} is not the folder of a model: {Path(value, 'config.json')} is missing"
        )


def must_run(option: str, program: str | None) -> None:
    from scout_hf.errors import MissingFileError

    if program and not shutil.which(program):
        raise MissingFileError(f"{option} {program} is missing, or is not executable")


@contextmanager
def exits_on_errors() -> Iterator[None]:
    """Print the message of a wrong setting or file and exit with code 2, without a traceback."""
    from scout_hf.errors import ScoutError

    try:
        yield
    except BrokenPipeError:
        # The reader, such as head, closed the pipe: typer exits silently.
        raise
    except (ScoutError, OSError, ValueError) as error:
        tell(f"error: {error}")
        raise typer.Exit(2) from error


@contextmanager
def ends_on_interrupt() -> Iterator[None]:
    """Exit with code 130 when the user interrupts, without a traceback."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise typer.Exit(130) from error


@contextmanager
def evaluation(threads: int | None, device: str | None = None) -> Iterator[None]:
    """As ``exits_on_errors``, with ``threads`` torch threads; raises if there is no such ``device``."""
    with exits_on_errors():
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
