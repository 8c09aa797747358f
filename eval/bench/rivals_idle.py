"""Whether those who are not timed do nothing meanwhile: CPU time of processes in the turns of others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from scout_hf.eval.bench.rivals_ours import Decoder
from scout_hf.eval.bench.rivals_theirs import Their

Arm = Decoder | Their


class Idle:
    """Watches that who is not timed does nothing."""

    def __init__(self) -> None:
        self._cpu: dict[str, float] = {}
        self._wall: dict[str, float] = {}

    def turn(self, arm: Arm, arms: dict[str, Arm]) -> Turn:
        """A context in which one arm is timed."""
        others = {
            name: one.rival.cpu_seconds for name, one in arms.items() if isinstance(one, Their) and one is not arm
        }
        if isinstance(arm, Their):
            others["transformers"] = _own_seconds
        return Turn(self, others)

    def add(self, name: str, cpu: float, wall: float) -> None:
        """What a process used in a turn of another one."""
        self._cpu[name] = self._cpu.get(name, 0.0) + max(0.0, cpu)
        self._wall[name] = self._wall.get(name, 0.0) + wall

    def shares(self) -> dict[str, float]:
        """CPUs used, by process."""
        return {name: cpu / max(self._wall[name], 1e-9) for name, cpu in self._cpu.items()}


class Turn:
    """What :meth:`Idle.turn` gives."""

    def __init__(self, idle: Idle, others: dict[str, Callable[[], float]]):
        self._idle, self._others = idle, others

    def __enter__(self) -> None:
        self._before = {name: cpu() for name, cpu in self._others.items()}
        self._begin = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        wall = time.perf_counter() - self._begin
        for name, cpu in self._others.items():
            self._idle.add(name, cpu() - self._before[name], wall)


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system
