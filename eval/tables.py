"""Tables as rows of text, for terminal, Markdown and HTML, and the formats of figures in them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

NONE = "–"


@dataclass
class Grid:
    """A table: the first ``words`` columns hold words, the others figures. Rich prints it as it is.

    ``tight`` leaves no space between columns, and folds no heading.
    """

    title: str
    names: Sequence[str]
    words: int = 1
    tight: bool = False
    rows: list[Sequence[str]] = field(default_factory=list)
    ends: set[int] = field(default_factory=set)

    def add(self, *cells: str, end: bool = False) -> None:
        """A row more; ``end`` draws a line below it."""
        self.ends |= {len(self.rows)} if end else set()
        self.rows.append(cells)

    def __rich__(self) -> Table:
        padding = 0 if self.tight else (0, 1, 0, 0)
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=padding)
        for index, name in enumerate(self.names):
            # Headings of several words go over several lines where the terminal is narrow; figures stay whole.
            whole = self.tight or index < self.words
            table.add_column(name, justify="left" if index < self.words else "right", no_wrap=whole)
        for index, row in enumerate(self.rows):
            table.add_row(*row, end_section=index in self.ends)
        return table


def by(rows: Iterable[Any], key: Callable[[Any], Hashable]) -> dict[Any, list[Any]]:
    """Group rows by ``key``, in the order of first appearance."""
    groups: dict[Any, list[Any]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def show(parts: Iterable[Grid | str], note: str = "", console: Console | None = None) -> None:
    """Print tables and sentences without markup; the note is dim."""
    console = console or Console(markup=False, emoji=False)
    for part in parts:
        console.print(part, highlight=False)
    if note:
        console.print(note, style="dim", highlight=False)


# -- figures --------------------------------------------------------------------------------------------------------


def three(value: float | None) -> str:
    """At least three digits, and none behind the point from 100 on; a hyphen for None."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def short(count: int) -> str:
    """A number of tokens, whole thousands (of 1024) as such."""
    return f"{count // 1024}k" if count and count % 1024 == 0 else str(count)


def share(value: float | None) -> str:
    """A share in whole per cent; a hyphen for None."""
    return "-" if value is None else f"{value:.0%}"


def median(one: dict[str, Any]) -> str:
    """Milliseconds: the median, and its quartiles in brackets."""
    return f"{three(one['median_ms'])} ({three(one['q1_ms'])}-{three(one['q3_ms'])})"


def mib(count: float) -> str:
    """Bytes as MiB."""
    return f"{count / 2**20:.0f}" if count >= 10 * 2**20 else f"{count / 2**20:.1f}"


def tiers(held: dict[str, int]) -> str:
    """``host 12.4 + digests 0.8``, in MiB."""
    return " + ".join(f"{tier} {count / 2**20:.1f}" for tier, count in held.items() if count)
