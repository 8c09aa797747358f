"""Cells: one measurement of a study each; and which of them make one, one factor at a time around a centre."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from scout_hf import ScoutConfig
from scout_hf.eval import baselines  # noqa: F401 (registers the digests "oracle", "random" and "recent")
from scout_hf.eval.arms import FULL, METHODS, MODES
from scout_hf.eval.pocket import TASKS
from scout_hf.selection import digest_names

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
    """What is measured: a pocket model and one of its tasks, or ``text`` twice, and documents of so many tokens.

    The mode is a key of ``MODES``; block size, budget and digest are those of :class:`scout_hf.ScoutConfig`, None with
    full attention, which has none of them; other methods have no digest. The stress is one of ``STRESSES``.
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


@dataclass(frozen=True)
class Effort:
    """How much is asked in a cell.

    Questions; pieces of held-out text (``windows``), and tokens of each that are scored (``steps``); questions or
    windows whose layers are looked into (``watched``); and what documents and texts are drawn from.
    """

    questions: int = 48
    windows: int = 16
    steps: int = 64
    watched: int = 4
    seed: int = 0

    def of(self, cell: Cell) -> dict[str, int]:
        """What of it concerns a cell."""
        names = ("windows", "steps") if cell.task == TEXT else ("questions",)
        return {name: value for name, value in asdict(self).items() if name in (*names, "watched", "seed")}


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
    """Cells that pass the filters; full attention passes filters of fields that it does not have.

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


TOKENS, BLOCK, BUDGET = 4096, 32, 0.125
TOKEN_BUDGET = 512
# As shipped, on one tier and on two; then with the paper's query for the CPU.
MAIN = ("real", "real-two-tiers", "predicted-auto")
PAPERS = (*MAIN, "predicted")
REST = ("predicted-real-cpu", "predicted-no-recall", "real-int8")
QUICK_TASKS = ("needle", "trace")
QUICK, WHOLE = Effort(questions=32, windows=8, steps=64, watched=2), Effort()


def cells_of(models: Sequence[str], quick: bool) -> list[Cell]:
    """All cells of a study of these models, each once, ordered so that those that share documents are together."""
    cells = list(dict.fromkeys(_quick(models) if quick else _whole(models)))
    return sorted(cells, key=lambda cell: (cell.model == TEXT, cell.model, cell.stress, cell.task, cell.tokens))


def _subjects(models: Iterable[str], tasks: Sequence[str]) -> list[tuple[str, str]]:
    return [(model, task) for model in models for task in ((TEXT,) if model == TEXT else tasks)]


def _quick(models: Sequence[str]) -> Iterator[Cell]:
    for of in _subjects(models, QUICK_TASKS):
        for budget in (0.06, BUDGET) if of == (TEXT, TEXT) else (BUDGET,):
            digests = real_digests() if of[0] != TEXT else ("minmax", _default())
            yield from _around(of, budget=budget, digests=digests, modes=PAPERS)
        yield from _controls(of)
        yield from (Cell(*of, TOKENS, mode, BLOCK, BUDGET, _default()) for mode in REST)


def _whole(models: Sequence[str]) -> Iterator[Cell]:
    swept = tuple(name for name in real_digests() if name not in ("auto", "minmax-int8"))
    for of in _subjects(models, TASKS):
        yield from (Cell(*of, TOKENS, mode, BLOCK, BUDGET, digest) for digest in real_digests() for mode in REST)
        yield from (Cell(*of, TOKENS, mode, BLOCK, BUDGET) for mode in METHODS)
        yield from _controls(of)
        for budget in (0.03, 0.06, 0.125, 0.25, 0.5):
            yield from _around(of, budget=budget, digests=real_digests(), modes=PAPERS)
        yield from _around(of, budget=TOKEN_BUDGET, digests=swept)
        for size in (16, 64):
            yield from _around(of, block_size=size, digests=swept)
        for tokens, budgets in {1024: (), 2048: (), 8192: (0.06,)}.items():
            for budget in (BUDGET, TOKEN_BUDGET, *budgets):
                yield from _around(of, tokens=tokens, budget=budget, digests=swept)
        for stress in ("scale", "offset"):
            yield from _around(of, stress=stress, digests=swept)
        if of != (TEXT, TEXT):
            # Up to 4k there are no more of them than without.
            yield from _around(of, tokens=8192, stress="rivals", digests=swept)


def _around(
    of: tuple[str, str],
    tokens: int = TOKENS,
    block_size: int = BLOCK,
    budget: int | float = BUDGET,
    digests: Sequence[str] = (),
    stress: str = "none",
    modes: Sequence[str] = MAIN,
) -> Iterator[Cell]:
    """Full attention, the oracle and digests."""
    yield Cell(*of, tokens, FULL, stress=stress)
    for digest in ("oracle", *digests):
        for mode in modes:
            yield Cell(*of, tokens, mode, block_size, budget, digest, stress)


def _controls(of: tuple[str, str]) -> Iterator[Cell]:
    yield from (Cell(*of, TOKENS, "real", BLOCK, BUDGET, digest) for digest in ("random", "recent"))


def _default() -> str:
    from scout_hf import ScoutConfig

    return ScoutConfig().digest


def weight(cell: Cell) -> float:
    """Relative duration of a cell, for a progress bar."""
    slow = 4 if cell.mode == FULL else 2 if cell.digest == "oracle" else 1
    return slow * (1 + cell.tokens / 2048) * (4 if cell.task == TEXT else 1)
