"""How the benchmarks write figures and tables."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table


def new_table(title: str, *columns: str, words: int = 1) -> Table:
    """An empty table for a terminal; the first ``words`` columns hold words, the others numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(columns):
        # Headings of several words go over several lines where the terminal is narrow; figures stay whole.
        table.add_column(name, justify="left" if index < words else "right", no_wrap=index < words)
    return table


def three(value: float) -> str:
    """At least three digits, and none behind the point from 100 on."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def short(count: int) -> str:
    """A number of tokens, whole thousands (of 1024) as such."""
    return f"{count // 1024}k" if count and count % 1024 == 0 else str(count)


def median(one: dict[str, Any]) -> str:
    """Milliseconds: the median, and its quartiles in brackets."""
    return f"{three(one['median_ms'])} ({three(one['q1_ms'])}-{three(one['q3_ms'])})"
