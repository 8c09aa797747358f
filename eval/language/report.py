"""The study of a language model as tables, for a terminal and for Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from scout_hf.eval.language.figures import ALL, HEADLINE, TASKS, Mean, Row, rows
from scout_hf.eval.language.tasks import CONTINUATION, RECORDS, REPETITION
from scout_hf.eval.tables import NONE, Grid, by, share

COMMAND = "scout-hf fidelity"
FEW = 0.5
"""Share of right answers below which the model itself finds too little."""

NOTE = (
    "log-prob: of the right answer, in nats, mean over answers; loss: full attention's less this one's, over the same "
    "answers. KL: divergence of the next token's distribution from full attention's, in nats, mean over all decode "
    "steps. Figures are means ± standard errors, of answers, and of steps by the spread between answers. attended: "
    "tokens per step, layer and KV head."
)


def tables(record: dict[str, Any], layers: bool = False) -> Iterator[Grid | str]:
    """The headline, then tasks, records and continuation, what was seen inside; ``layers``: by layer, too."""
    every = rows(record)
    yield _headline(record, every)
    yield _said(every)
    yield _by_task(every)
    yield _writing(every)
    yield _inside(every)
    if layers:
        yield from (_by_layer(row) for row in every if row.layers)


def parts(record: dict[str, Any]) -> Iterator[Grid | str]:
    """The same for a page, where tables have no titles."""
    for part in tables(record):
        if isinstance(part, Grid):
            yield f"{part.title[:1].upper()}{part.title[1:]}:"
        yield part


def _grid(title: str, every: list[Row], names: tuple[str, ...], cells: Callable[[Row], list[str]]) -> Grid:
    """A line per setting, lengths apart."""
    grid = Grid(title, ("tokens", "budget, digest", *names), 2)
    for tokens, group in by(every, lambda row: row.tokens).items():
        for row in group:
            grid.add(str(tokens) if row is group[0] else "", row.label, *cells(row), end=row is group[-1])
    return grid


def _headline(record: dict[str, Any], every: list[Row]) -> Grid:
    def cells(row: Row) -> list[str]:
        one, full = row.scores[HEADLINE], row.setting is None
        return [
            f"{row.attended:.0f}",
            percent(one.right),
            f"{one.log_prob.value:.2f}",
            NONE if full else one.loss.shown(2, "+"),
            NONE if full else row.scores[ALL].divergence.shown(3),
        ]

    title = f"{record['model']}: what sparse decoding loses"
    return _grid(title, every, ("attended", "right, %", "log-prob", "loss", "KL"), cells)


def _said(every: list[Row]) -> str:
    """What the headline stands on."""
    full = [row for row in every if row.setting is None]
    told = []
    for row in full:
        steps = max((one.scores[ALL].divergence.n for one in every if one.tokens == row.tokens), default=0)
        told.append(f"{row.scores[HEADLINE].right.n} answers and {steps} steps at {row.tokens} tokens")
    lines = [f"{', '.join(told)}. {NOTE}"]
    for row in full:
        if row.scores[HEADLINE].right.value < FEW:
            lines.append(
                f"At {row.tokens} tokens full attention itself gives {percent(row.scores[HEADLINE].right)} % of the "
                "answers: the model is too small for these questions; log-prob and KL say more."
            )
    return " ".join(lines)


def _by_task(every: list[Row]) -> Grid:
    several = len({row.tokens for row in every}) > 1
    grid = Grid("by task; log-prob and loss per token", ("", "n", "right, %", "log-prob", "loss", "KL"))
    for row in every:
        grid.add(f"{row.label}, {row.tokens} tokens" if several else row.label, *[""] * 5)
        tasks = [task for task in TASKS if task in row.scores]
        for task in tasks:
            one = row.scores[task]
            grid.add(
                f"- {task}",
                str(one.right.n),
                NONE if task in (REPETITION, CONTINUATION) else percent(one.right),
                f"{one.token_log_prob.value:.2f}",
                NONE if row.setting is None else one.token_loss.shown(2, "+"),
                NONE if row.setting is None else one.divergence.shown(3),
                end=task == tasks[-1],
            )
    return grid


def _writing(every: list[Row]) -> Grid:
    """Records that were generated, and given; perplexity of the text that goes on."""

    def cells(row: Row) -> list[str]:
        given, onward = row.scores.get(RECORDS), row.scores.get(CONTINUATION)
        return [
            percent(row.fields),
            NONE if row.setting is None else percent(row.same),
            given.log_prob.shown(2) if given else NONE,
            given.loss.shown(2, "+") if given and row.setting else NONE,
            f"{math.exp(-onward.token_log_prob.value):.2f}" if onward else NONE,
        ]

    fields = {row.fields.n for row in every}
    names = ("right, %", "as full, %", "log-prob", "loss", "perplexity")
    title = f"records written down ({'/'.join(map(str, sorted(fields)))} fields), forced ones, and continuation"
    return _grid(title, every, names, cells)


def _inside(every: list[Row]) -> Grid:
    def cells(row: Row) -> list[str]:
        seen = row.inside
        per_step = f"{row.attended / row.context:.1%}"
        return [per_step, *_seen(seen), f"{row.seconds:.0f}"]

    return _grid("attention itself", every, ("read", *SEEN.values(), "seconds"), cells)


SEEN = {"mass": "mass", "output_error": "error", "cosine": "cosine", "cpu_ratio": "CPU"}


def _seen(found: dict[str, float | None]) -> list[str]:
    return [two(found[name]) if name == "cosine" else share(found[name]) for name in SEEN]


def _by_layer(row: Row) -> Grid:
    grid = Grid(f"{row.label}, {row.tokens} tokens, by layer", ("layer", "attended", *SEEN.values()))
    for one in row.layers:
        grid.add(f"{one['layer']:.0f}", f"{one['attended']:.0f}", *_seen(one))
    return grid


def percent(mean: Mean) -> str:
    """``25±4``."""
    scaled = Mean(100 * mean.value, 100 * mean.error, mean.n)
    return scaled.shown(0)


def two(value: float | None) -> str:
    """Two digits; a hyphen for None."""
    return "-" if value is None else f"{value:.2f}"
