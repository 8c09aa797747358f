"""The record of a benchmark of many arms, in a file that a later run goes on with."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench import machine
from scout_hf.eval.bench.rules import GPU_DECODE
from scout_hf.files import read_json, write_text

SIZES = {"arms": "batch", "largest": "cap_gib"}


@dataclass
class Record:
    """What was found so far, ``record``, kept in a file if there is one.

    Parameters
    ----------
    path : Path or None
    fresh : bool
        Whether to forget what the file has.
    settings : dict
        What all figures of a file have in common.

    Raises
    ------
    ValueError
        If the file has figures of other settings.
    """

    path: Path | None
    fresh: bool
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self.record: dict[str, Any] = {"benchmark": "gpu_decode", "models": {}, "arms": [], "largest": []}
        if self.path and self.path.exists() and not self.fresh:
            self.record |= read_json(self.path, GPU_DECODE, "give another --out, or --fresh to write over it")
            others = self.record["settings"]
            if differ := [name for name, value in self.settings.items() if others.get(name) != value]:
                theirs = ", ".join(f"{name}={others.get(name)!r}" for name in differ)
                raise ValueError(
                    f"{self.path} holds figures with {theirs}, which cannot stand beside what is asked for; give the "
                    "same settings to go on, --fresh to begin anew, or another --out"
                )

    def begin(self, place: torch.device) -> None:
        """Rates are measured anew; figures of one run carry its time, and only they are compared."""
        facts, before = devices.describe(place), self.record.get("device")
        if before and before["name"] != facts["name"]:
            raise ValueError(
                f"{self.path} holds figures of {before['name'] or 'a CPU'}, and this is {facts['name'] or 'a CPU'}; "
                "give --fresh to begin anew, or another --out"
            )
        self.run = time.strftime("%Y-%m-%d %H:%M:%S")
        self.record |= {"settings": self.settings, "machine": machine.describe(), "device": facts}
        self.record["cache_grows"] = "by one token per step, warm-up included"
        self.record["before_each_step"] = "one more step of the same arm, not timed"
        self.record["selection"] = (
            f"synthetic: {self.settings['drift']:.0%} of the chosen blocks change per step, by a random walk of scores"
        )

    def has(self, part: str, model: str, context: int, size: float, arm: str) -> bool:
        """Whether there is a result in ``arms`` (``size`` is the batch) or ``largest`` (the cap); an error is none."""
        found = self._at(part, model, context, size, arm)
        return any("failed" not in one for one in found)

    def smaller_failed(self, model: str, context: int, batch: int, arm: str) -> dict[str, str] | None:
        """A result without a try, if the same with fewer rows ran out of memory."""
        for one in self.record["arms"]:
            same = (one["model"], one["context"], one["arm"]) == (model, context, arm)
            if same and one["batch"] <= batch and "oom" in one:
                return {"skipped": f"batch {one['batch']} ran out of memory"}
        return None

    def add(self, part: str, model: str, context: int, size: float, arm: str, found: dict[str, Any]) -> None:
        """Add a result, in the place of one that is there, and write everything."""
        before = self._at(part, model, context, size, arm)
        where = {"model": model, "context": context, SIZES[part]: size, "arm": arm}
        self.record[part] = [one for one in self.record[part] if one not in before]
        self.record[part].append(where | found | {"run": self.run})
        if self.path:
            write_text(self.path, json.dumps(self.record, allow_nan=False))

    def _at(self, part: str, *where: Any) -> list[dict[str, Any]]:
        names = ("model", "context", SIZES[part], "arm")
        return [one for one in self.record[part] if tuple(one[name] for name in names) == where]
