"""The stages of ``bench gpu``, in the order in which they run, and what a stage is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

HERE = "scout_hf.eval.bench"


class Stage(NamedTuple):
    """A part of the benchmark that runs in a process of its own.

    Attributes
    ----------
    name, about : str
    jobs : str
        ``module:function`` that gives its jobs, called in that process with a :class:`Given`.
    most, least : float
        Seconds after which it is ended, and without which it is not begun.
    needs : tuple of str
        Stages without which it is not begun.
    on_cpu : bool
        Whether it runs without a GPU.
    late_on_cpu : bool
        Whether it comes last there, so that a rehearsal has time for the others.
    """

    name: str
    about: str
    jobs: str
    most: float
    least: float
    needs: tuple[str, ...] = ()
    on_cpu: bool = True
    late_on_cpu: bool = False


STAGES = (
    Stage("machine", "versions, rates, pinning", f"{HERE}.gpu_machine:jobs", 45, 5),
    Stage("smoke", "each hand-over, against stock", f"{HERE}.gpu_smoke:jobs", 90, 8, ("machine",)),
    Stage("tests", "tests/gpu", f"{HERE}.gpu_tests:of_gpu", 150, 15, ("machine",)),
    Stage("triton", "tests/triton", f"{HERE}.gpu_tests:of_triton", 150, 15, ("machine",), late_on_cpu=True),
    Stage("kernels", "tuning, kernels in graphs", f"{HERE}.gpu_kernel:jobs", 120, 20, ("machine",), on_cpu=False),
    Stage("short", "decode steps, 8 x 8k", f"{HERE}.gpu_decode:short", 90, 20, ("smoke",)),
    Stage("long", "decode steps, 8 x 64k", f"{HERE}.gpu_decode:long", 210, 20, ("smoke",)),
    Stage("wide", "decode steps, 16 x 32k", f"{HERE}.gpu_decode:wide", 160, 20, ("smoke",)),
    Stage("offloaded", "stock, offloaded", f"{HERE}.gpu_decode:offloaded", 100, 20, ("machine",), on_cpu=False),
)


@dataclass
class Given:
    """What the process of a stage gets.

    Attributes
    ----------
    settings : dict
        ``device``, ``layers``, ``budget``, ``digest``, ``drift``, ``seed``.
    until : float
        When it is ended, by ``time.time()``.
    logs : str
        Folder for what it writes beside its results.
    known : dict
        What earlier stages found: by stage, then by job.
    tries : dict
        How often its process died in a job.
    so_far : callable
        Takes what is known of the job that runs, in case it does not end.
    """

    settings: dict[str, Any]
    until: float
    logs: str
    known: dict[str, dict[str, dict[str, Any]]]
    tries: dict[str, int]
    so_far: Callable[[dict[str, Any]], Any] = field(default=lambda found: None)


class Job(NamedTuple):
    """One cell of a stage.

    Attributes
    ----------
    name : str
    run : callable
        Gives what it found, by name, for JSON.
    limit : float
        Seconds after which the process is ended; the jobs behind it run in a new one.
    needs : tuple of str
        Jobs of this stage without whose success it is left out.
    again : bool
        Whether it makes what other jobs use, so that it runs again in every process.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    limit: float = 60.0
    needs: tuple[str, ...] = ()
    again: bool = False


FAILED = ("failed", "oom", "skipped", "absent")
"""What a cell has instead of figures."""


def why_none(found: dict[str, Any]) -> str | None:
    """Why a cell has no figures; None if it has."""
    return next((f"{word}: {found[word]}" if word != "skipped" else found[word] for word in FAILED if word in found),
                None)  # fmt: skip


def first_line(error: BaseException) -> str:
    """Class and first line of the message of an error, for a record, and from there for terminals and pages."""
    line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return "".join(letter if letter.isprintable() else " " for letter in line)


def find_stage(name: str, stages: Sequence[Stage]) -> int:
    """The place of a stage; ValueError, with the known ones, for another name."""
    names = [stage.name for stage in stages]
    if name not in names:
        raise ValueError(f"--from {name}: allowed are {', '.join(names)}; try smoke")
    return names.index(name)
