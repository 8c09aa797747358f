"""One measurement of a study, and the ways of attending it may be about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from scout_hf import ScoutConfig
from scout_hf.eval import baselines  # noqa: F401 (registers the digests "random" and "recent")
from scout_hf.eval.fidelity import oracle  # noqa: F401 (registers the digest "oracle")
from scout_hf.methods import method_names
from scout_hf.selection import digest_names

FULL = "full"
METHODS = tuple(name for name in method_names() if name != "scout")
"""Modes that are a method of their own: they choose without digests of blocks, or not at all."""

MODES: dict[str, dict[str, Any] | None] = {
    FULL: None,
    "real": {"split": "off"},
    "real-int8": {"split": "off", "host_dtype": "int8"},
    "real-two-tiers": {"split": "cpu", "layer_ahead": False},
    "predicted": {"split": "cpu", "cpu_query": "predicted"},
    "predicted-auto": {"split": "cpu", "cpu_query": "auto"},
    "predicted-real-cpu": {"split": "cpu", "cpu_query": "real"},
    "predicted-no-recall": {"split": "cpu", "cpu_query": "predicted", "recall": None},
    **{name: {"method": name} for name in METHODS},
}
"""Settings of every way of attending, next to budget, block size and digest; None is the model's own attention."""

SAME_TIERS = {
    "real": "real",
    "real-int8": "real",
    "real-two-tiers": "real-two-tiers",
    "predicted": "real-two-tiers",
    "predicted-auto": "real-two-tiers",
    "predicted-real-cpu": "real-two-tiers",
    "predicted-no-recall": "real-two-tiers",
    **{name: name for name in METHODS},
}
"""Which mode shows what selection alone costs: the real query on as many tiers, since two attend to a little more.

Of another method all its loss is that of its selection.
"""

CONTROLS = ("oracle", "random", "recent")
"""Digests that are no digests: the best blocks there are, and blocks chosen without a look."""

STRESSES = ("none", "scale", "offset", "rivals")
"""Outlier channels in the weights (``scale``, ``offset``); confusable text that grows with length (``rivals``)."""

SPARSE = ("block_size", "budget", "digest")
TEXT = "text"
"""The model, and the task, of perplexity on held-out text."""


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes
    ----------
    model, task : str
        A pocket model and one of its tasks, or ``text`` twice.
    tokens : int
        Length of the documents.
    mode : str
        A key of ``MODES``.
    block_size, budget, digest
        As in :class:`scout_hf.ScoutConfig`; None with full attention, which has none of them. Other methods have no
        digest.
    stress : str
        One of ``STRESSES``.
    """

    model: str
    task: str
    tokens: int
    mode: str = FULL
    block_size: int | None = None
    budget: int | float | None = None
    digest: str | None = None
    stress: str = "none"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: there are {', '.join(MODES)}")
        if self.stress not in STRESSES:
            raise ValueError(f"stress={self.stress!r}: there are {', '.join(STRESSES)}")
        given = tuple(name for name in SPARSE if getattr(self, name) is not None)
        if given != self.takes(self.mode):
            raise ValueError(
                f"{self.as_dict()}: block_size, budget and digest belong to every mode but {FULL!r}, and all three; "
                f"other methods ({', '.join(METHODS)}) take no digest"
            )

    @staticmethod
    def takes(mode: str) -> tuple[str, ...]:
        """Which of ``SPARSE`` a mode has."""
        return () if mode == FULL else SPARSE[:2] if mode in METHODS else SPARSE

    def config(self, **more: Any) -> ScoutConfig | None:
        """The settings to patch with; None for the model's own attention."""
        if self.mode == FULL:
            return None
        sizes = {name: getattr(self, name) for name in self.takes(self.mode)}
        return ScoutConfig(**sizes, **MODES[self.mode], **more)

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        words = [self.model, self.task, f"{self.tokens} tokens", self.mode]
        if self.mode != FULL:
            words += [self.digest] * (self.digest is not None)
            words += [f"block {self.block_size}", f"budget {budget_name(self.budget)}"]
        return " ".join(words if self.stress == "none" else [*words, f"stress {self.stress}"])


def real_digests() -> tuple[str, ...]:
    """Every registered digest but the controls."""
    return tuple(name for name in digest_names() if name not in CONTROLS)


def budget_name(budget: int | float | None) -> str:
    """``12.5 %`` for a share, ``512`` for tokens, ``all`` for None."""
    if budget is None:
        return "all"
    return str(budget) if isinstance(budget, int) else f"{100 * budget:g} %"


def parse_filters(texts: Sequence[str]) -> dict[str, set[str]]:
    """``["mode=real,predicted", "tokens=4096"]`` as what each field may be; ValueError for anything else."""
    names = [field.name for field in fields(Cell)]
    found: dict[str, set[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or name not in names or not values:
            raise ValueError(
                f"--only {text}: give a field and its values, as in digest=minmax,sign; fields are {', '.join(names)}"
            )
        found.setdefault(name, set()).update(value.strip() for value in values.split(","))
    return found


def keep(cells: Iterable[Cell], filters: dict[str, set[str]]) -> list[Cell]:
    """Cells whose fields are among those wanted; full attention passes filters of what it does not have.

    ValueError for a value that no cell has.
    """
    cells = list(cells)
    for name, wanted in filters.items():
        there = {str(getattr(cell, name)) for cell in cells}
        if missing := sorted(wanted - there):
            raise ValueError(
                f"--only {name}={','.join(missing)}: nothing of that in this study; {name} is one of "
                f"{', '.join(sorted(there - {'None'}))}"
            )
    return [
        cell
        for cell in cells
        if all(
            str(getattr(cell, name)) in wanted or (cell.mode == FULL and getattr(cell, name) is None)
            for name, wanted in filters.items()
        )
    ]
