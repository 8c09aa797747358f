"""Parts of a Markdown file that are made from results, between two marks, so that both always say the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from scout_hf.files import write_text

BAR = "\\|"
_BREAK = re.compile(r"\s*[\r\n]+\s*")
_BETWEEN = re.compile(r"(?<!\\)\|")


def begin_mark(command: str) -> str:
    """The line before what a command makes."""
    return f"<!-- made by {command}: do not edit -->"


def end_mark(command: str) -> str:
    """The line behind it."""
    return f"<!-- end of what {command} made -->"


def between_marks(text: str, command: str) -> tuple[str, str, str] | None:
    """The text up to the first mark, between the marks, and from the second on; None without them."""
    before, begin, rest = text.partition(begin_mark(command))
    between, end, after = rest.partition(end_mark(command))
    return (before + begin, between, end + after) if begin and end else None


def update(path: Path, command: str, made: str) -> bool:
    """Put what a command makes between its marks in a file; whether that changed it. ValueError without the marks."""
    old = path.read_text(encoding="utf-8")
    parts = between_marks(old, command)
    if parts is None:
        marks = f"{begin_mark(command)}\n{end_mark(command)}"
        raise ValueError(f"{path} has no place for the tables; put these two lines where they belong:\n{marks}")
    # Tables and words alone: what comes out of a record makes no markup and no mark, whatever it says.
    new = f"{parts[0]}\n{made.replace('<', '&lt;')}\n{parts[2]}"
    if new != old:
        # The file that was read, where the page is a link.
        write_text(path.resolve(), new)
    return new != old


def head(*names: str) -> Iterator[str]:
    """The first two lines of a table."""
    yield line(*names)
    yield "|" + "---|" * len(names)


def line(*cells: str) -> str:
    """A row of a table; a bar or the end of a line inside of a cell does not end it."""
    return f"| {' | '.join(_BREAK.sub(' ', cell).replace('|', BAR) for cell in cells)} |"


def cells_of(row: str) -> list[str]:
    """The cells that :func:`line` was given."""
    return [cell.strip().replace(BAR, "|") for cell in _BETWEEN.split(row.strip().removeprefix("|"))][:-1]
