"""Which cells make a study: one factor at a time around a centre, and a small one that says the most important."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from scout_hf.eval.fidelity.cells import FULL, METHODS, TEXT, Cell, real_digests
from scout_hf.eval.fidelity.measure import Effort
from scout_hf.eval.pocket import TASKS

TOKENS, BLOCK, BUDGET = 4096, 32, 0.125
TOKEN_BUDGET = 512
# As shipped, on one tier and on two; then with the paper's query for the CPU.
MAIN = ("real", "real-two-tiers", "predicted-auto")
PAPERS = (*MAIN, "predicted")
REST = ("predicted-real-cpu", "predicted-no-recall", "real-int8")
QUICK_TASKS = ("needle", "trace")
QUICK, WHOLE = Effort(questions=32, windows=8, steps=64, watched=2), Effort()


def study(models: Sequence[str], quick: bool) -> list[Cell]:
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
    """About how long a cell takes beside others, for a progress bar."""
    slow = 4 if cell.mode == FULL else 2 if cell.digest == "oracle" else 1
    return slow * (1 + cell.tokens / 2048) * (4 if cell.task == TEXT else 1)
