"""Recall intervals measured per layer, as JSON that is checked against the model it belongs to (ScoutAttention 3.4)."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from scout_hf.errors import ConfigError
from scout_hf.files import write_text

FORMAT = "scout_hf.recall/1"


@dataclass(frozen=True)
class RecallIntervals:
    """Steps between recalls, one number per layer.

    Parameters
    ----------
    intervals : tuple of int
        ``intervals[i]`` is the number of decode steps between two recalls of layer ``i``; 0 means never.
    threshold : float
        The CPU share that the profile kept every layer under (beta of the paper).
    model_type : str
        ``config.model_type`` of the profiled model; checked when the profile is used.
    budget, block_size
        The settings it was measured with; kept for the record.
    """

    intervals: tuple[int, ...]
    threshold: float
    model_type: str
    budget: int | float | None = None
    block_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "intervals", tuple(self.intervals))
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in self.intervals)
        if not self.intervals or not whole:
            raise ConfigError(
                f"intervals={self.intervals!r} is not allowed: one whole number of steps per layer, 0 for never"
            )
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or not 0.0 < self.threshold <= 1.0:
            raise ConfigError(f"threshold={self.threshold!r} is not allowed: a number in (0, 1]")

    def save(self, path: str | os.PathLike) -> None:
        """Write the profile as JSON; a reader never sees half a file."""
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> RecallIntervals:
        """Read a profile that ``save`` wrote.

        Raises
        ------
        ConfigError
            If the file is not such a profile.
        """
        try:
            data = json.loads(Path(path).read_text())
            if data.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{os.fspath(path)} is no recall profile of this version ({FORMAT}): {error}; make one with "
                "handle.profile_recall(prompts).save(path)"
            ) from error

    def check(self, model_type: str, layers: int) -> None:
        """Raise ConfigError unless the profile belongs to a model of this type and depth."""
        if (self.model_type, len(self.intervals)) != (model_type, layers):
            raise ConfigError(
                f"the recall profile was measured on a {self.model_type!r} model with {len(self.intervals)} layers, "
                f"this is {model_type!r} with {layers}; profile this model with handle.profile_recall(prompts)"
            )


def intervals_below(threshold: float, ratios: list[list[float]]) -> tuple[int, ...]:
    """The longest interval per layer that keeps its CPU share under ``threshold``.

    Parameters
    ----------
    threshold : float
        Highest CPU share allowed.
    ratios : list of list of float
        ``ratios[layer][step]``: mean CPU share of that layer, so many steps after its residents were chosen.

    Returns
    -------
    tuple of int
        At least 1 per layer; 0 (never) for a layer that no step brought over the threshold.
    """
    found = []
    for layer in ratios:
        over = next((step for step, ratio in enumerate(layer) if ratio >= threshold), None)
        found.append(0 if over is None else max(1, over))
    return tuple(found)
