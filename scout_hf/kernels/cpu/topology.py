"""How many CPUs this process may use, and their NUMA nodes.

Functions take the folder to use as ``/``, so that tests can provide another machine.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path

from scout_hf.errors import ConfigError

ROOT = Path("/")


def usable_cpus() -> tuple[int, ...]:
    """The CPUs that the calling thread may run on, ascending."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def cpu_quota(root: Path = ROOT) -> float | None:
    """The cgroup CPU quota, in CPUs (1.5: one and a half CPUs); None if there is no limit."""
    limits = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mounts = root / "sys/fs/cgroup"
        if not controllers:
            read, folders = _quota_v2, [mounts, mounts / "unified"]
        elif "cpu" in controllers.split(","):
            read, folders = _quota_v1, [mounts / controllers, mounts / "cpu"]
        else:
            continue
        # A group is limited by its ancestors too. Inside a container the path may be the host's, of which only the root
        # exists.
        group = Path(path.lstrip("/"))
        limits += [read(folder / part) for folder in folders for part in (group, *group.parents)]
    return min((limit for limit in limits if limit is not None), default=None)


def spare_workers(requested: int | None = None, root: Path = ROOT) -> int:
    """How many threads may compute in addition to the main thread.

    Parameters
    ----------
    requested : int or None
        Upper limit; None for no limit.

    Returns
    -------
    int
        At most the usable CPUs and the cgroup quota, less one for the main thread; may be 0.

    Raises
    ------
    ConfigError
        If ``requested`` is negative.
    """
    if requested is not None and requested < 0:
        raise ConfigError(f"threads={requested} is not allowed: take 0 or more, or None for one per spare CPU")
    cores = len(usable_cpus())
    quota = cpu_quota(root)
    if quota is not None:
        cores = min(cores, int(quota))
    spare = max(cores - 1, 0)
    return spare if requested is None else min(requested, spare)


def worker_cpus(workers: int | None = None, root: Path = ROOT) -> tuple[int, ...]:
    """CPUs for ``workers`` threads (None: as many as ``spare_workers()``), ascending.

    On a NUMA machine they are the CPUs of the calling thread's node (which holds the memory that it touches first), if
    that node has enough for the workers and the thread itself; otherwise all usable CPUs.
    """
    valid = usable_cpus()
    workers = spare_workers(root=root) if workers is None else workers
    node = current_node(root)
    near = () if node is None else numa_nodes(root).get(node, ())
    here = tuple(cpu for cpu in valid if cpu in near)
    return here if len(here) > workers else valid


def numa_nodes(root: Path = ROOT) -> dict[int, tuple[int, ...]]:
    """The CPUs of every NUMA node that has some; empty if unknown."""
    nodes = {}
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        cpus = _parse_cpu_list(_read(folder / "cpulist"))
        if cpus:
            nodes[int(folder.name[4:])] = cpus
    return dict(sorted(nodes.items()))


def current_node(root: Path = ROOT, cpu: int | None = None) -> int | None:
    """The NUMA node of a CPU, by default of the calling thread's; None if unknown."""
    cpu = current_cpu() if cpu is None else cpu
    return next((node for node, cpus in numa_nodes(root).items() if cpu in cpus), None)


def current_cpu() -> int | None:
    """The CPU that the calling thread runs on now; None if unknown."""
    try:
        cpu = ctypes.CDLL(None).sched_getcpu()
    except (AttributeError, OSError, TypeError):
        return None
    return cpu if cpu >= 0 else None


def _quota_v2(group: Path) -> float | None:
    return _ratio(*(_read(group / "cpu.max").split() + ["", ""])[:2])


def _quota_v1(group: Path) -> float | None:
    return _ratio(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    try:
        quota_us, period_us = int(quota), int(period)
    except ValueError:  # "max", or no such file
        return None
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None


def _parse_cpu_list(text: str) -> tuple[int, ...]:
    """Parse a list such as ``0-3,8``."""
    return tuple(sorted(cpu for part in text.strip().split(",") if part for cpu in _span(part)))


def _span(part: str) -> Iterable[int]:
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
