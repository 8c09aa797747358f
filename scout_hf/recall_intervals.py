"""Recall intervals per layer (ScoutAttention, section 3.4), saved as JSON and checked against the model."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from scout_hf.errors import ConfigError
from scout_hf.files import read_json, write_text
from scout_hf.rules import count, fields, items, number, one_of, text

FORMAT = "scout_hf.recall_intervals/1"
LARGEST_FILE = 1 << 20
_REMEDY = "handle.profile_recall(prompts).save(path)"


def _budget(value: Any) -> None:
    """None, a number of tokens, or a share of the context."""
    if value is not None:
        number(1e-6, 1.0)(value) if isinstance(value, float) else count(1)(value)


_FIELDS = {
    "intervals": items(count(0, 2**31 - 1), fewest=1, most=4096),
    "threshold": number(1e-6, 1.0),
    "model_type": text(200),
    "budget": _budget,
    "block_size": count(1, 1 << 16),
}
_NEEDED = ("intervals", "threshold", "model_type")
_RULE = fields(
    {"format": one_of(FORMAT)} | {name: _FIELDS[name] for name in _NEEDED},
    {name: rule for name, rule in _FIELDS.items() if name not in _NEEDED},
    closed=True,
)


@dataclass(frozen=True)
class RecallIntervals:
    """Decode steps between two recalls, per layer. ``handle.profile_recall`` measures them.

    Parameters
    ----------
    intervals : tuple of int
        Of layer ``i``: decode steps between two recalls; 0 means never.
    threshold : float
        The CPU share that every layer stayed under in the profile, in (0, 1]; beta of the paper.
    model_type : str
        ``config.model_type`` of the profiled model; checked when the profile is used.
    budget, block_size
        The settings of the profile, for the record only.

    Raises
    ------
    ConfigError
        If a value is not allowed.

    Examples
    --------
    >>> intervals = scout_hf.RecallIntervals((8, 0, 16, 4), threshold=0.12, model_type="llama")
    >>> intervals.save("recall.json")
    >>> config = scout_hf.ScoutConfig(recall=scout_hf.RecallIntervals.load("recall.json"))
    """

    intervals: tuple[int, ...]
    threshold: float
    model_type: str
    budget: int | float | None = None
    block_size: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "intervals", tuple(self.intervals))
        for name, rule in _FIELDS.items():
            value = getattr(self, name)
            try:
                rule(list(value) if name == "intervals" else value)
            except ValueError as error:
                what = "one whole number of steps per layer, 0 for never; " if name == "intervals" else ""
                raise ConfigError(f"{name}={value!r:.80} is not allowed: {what}{error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile as JSON, atomically.

        Parameters
        ----------
        path : str or path

        Raises
        ------
        OSError
            If the folder is missing or cannot be written to.

        Examples
        --------
        >>> scout_hf.RecallIntervals((8, 4), threshold=0.12, model_type="llama").save("recall.json")
        """
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RecallIntervals:
        """Read a profile that ``save`` wrote.

        Parameters
        ----------
        path : str or path

        Returns
        -------
        RecallIntervals

        Raises
        ------
        ConfigError
            If the file is not such a profile. A missing file is a FileNotFoundError as well.

        Examples
        --------
        >>> scout_hf.RecallIntervals.load("recall.json").threshold
        0.12
        """
        data = read_json(path, _RULE, f"make a profile ({FORMAT}) with {_REMEDY}", LARGEST_FILE)
        del data["format"]
        return cls(**data)

    def check(self, model_type: str, layers: int) -> None:
        """Raise ConfigError unless the profile belongs to a model of this type and depth."""
        if (self.model_type, len(self.intervals)) != (model_type, layers):
            raise ConfigError(
                f"the recall profile was measured on a {self.model_type!r} model with {len(self.intervals)} layers, "
                f"this model is {model_type!r} with {layers}; profile this model with handle.profile_recall(prompts)"
            )


def intervals_below(threshold: float, ratios: list[list[float]]) -> tuple[int, ...]:
    """The longest interval per layer that keeps its CPU share under ``threshold``.

    Parameters
    ----------
    threshold : float
        Highest CPU share allowed.
    ratios : list of list of float
        ``ratios[layer][step]``: mean CPU share of that layer, ``step`` decode steps after its residents were chosen.

    Returns
    -------
    tuple of int
        At least 1 per layer; 0 (never) for a layer that stayed under the threshold in all steps.
    """
    found = []
    for layer in ratios:
        over = next((step for step, ratio in enumerate(layer) if ratio >= threshold), None)
        found.append(0 if over is None else max(1, over))
    return tuple(found)
