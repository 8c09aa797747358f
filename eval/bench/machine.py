"""What a measurement ran on, which CPUs it had, and who else was there."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import scout_hf
from scout_hf.diagnostics import cpu_quota, native_isa, usable_cpus, worker_cpus

LOOK_SECONDS = 0.3
SLACK = 0.5


def describe() -> dict[str, Any]:
    """Hardware and versions, for the record."""
    return {
        "cpu": _cpu_model(),
        "isa": native_isa(),
        "cpus": len(usable_cpus()),
        "cpu_quota": cpu_quota(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "huge_pages": _huge_pages(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "scout_hf": scout_hf.__version__,
        "commit": _commit(),
    }


def last_level_cache_bytes() -> int | None:
    """Of the CPU that is asked first; None where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        number = text.rstrip("KMG")
        if number.isdigit():
            sizes.append(int(number) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes, default=None)


def too_large(need: int, remedy: str) -> str | None:
    """What to say, and to do about it, if there is less memory than that."""
    free = psutil.virtual_memory().available
    if need <= free:
        return None
    return f"this needs {need / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free; {remedy}"


def check_memory(need: int, remedy: str) -> None:
    """The same as a ValueError."""
    if why := too_large(need, remedy):
        raise ValueError(why)


@contextmanager
def measuring(threads: int, tell: Callable[[str], Any]) -> Iterator[Company]:
    """Keep this process on so many CPUs, the least busy ones of its NUMA node, and torch to so many threads.

    Tells a warning if others need these CPUs too. ValueError if there are not so many.
    """
    usable = usable_cpus()
    if threads > len(usable):
        raise ValueError(f"--threads {threads}: this process has {len(usable)} CPUs; take at most that many")
    company = Company(threads)
    spare = len(usable) - threads
    if company.load > spare + SLACK:
        tell(
            f"warning: load average {company.load:.1f} with {spare} core(s) to spare: others compete for this machine; "
            "trust ratios within this run more than times"
        )
    teams = torch.get_num_threads()
    torch.set_num_threads(threads)
    if can_pin := hasattr(os, "sched_setaffinity"):
        busy = dict(enumerate(psutil.cpu_percent(LOOK_SECONDS, percpu=True)))
        near = sorted(worker_cpus(threads - 1), key=lambda cpu: busy.get(cpu, 0.0))
        company.cpus = sorted(near[:threads])
        _keep_on(company.cpus)
    try:
        yield company
    finally:
        torch.set_num_threads(teams)
        if can_pin:
            _keep_on(usable)


class Company:
    """Where something is measured (``cpus`` that this process is kept on), and how busy others keep the machine."""

    def __init__(self, threads: int):
        self.threads, self.load = threads, _load()
        self.cpus: list[int] | None = None
        self._begin = time.perf_counter()
        self._all, self._own = _busy_seconds(), _own_seconds()

    def record(self) -> dict[str, Any]:
        """For JSON; ``cpus_used_by_others`` is a mean over the time, hypervisor included."""
        wall = time.perf_counter() - self._begin
        others = max(0.0, _busy_seconds() - self._all - (_own_seconds() - self._own))
        return {
            "threads": self.threads,
            "cpus": self.cpus,
            "load_before": self.load,
            "load_after": _load(),
            "cpus_used_by_others": others / wall,
            "seconds": wall,
        }


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _keep_on(cpus: Iterable[int]) -> None:
    tasks = Path("/proc/self/task")
    for thread in [int(task.name) for task in tasks.iterdir()] if tasks.is_dir() else [0]:
        with suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread, cpus)


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _huge_pages() -> str | None:
    with suppress(OSError, IndexError):
        return Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split("[")[1].split("]")[0]
    return None


def _commit() -> str | None:
    """The commit that this code is at, with a plus if it was changed since; None outside a repository of its own."""
    home = Path(scout_hf.__file__).parent
    try:
        _git(home, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(home, "status", "--porcelain", "--untracked-files=no")
        return _git(home, "rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    call = ["git", "-C", str(folder), *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
