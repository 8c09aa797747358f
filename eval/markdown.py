"""Results as Markdown, and updating the generated parts of a file, between two marks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from scout_hf.eval.tables import Grid
from scout_hf.files import write_text

_BREAK = re.compile(r"\s*[\r\n]+\s*")


def to_markdown(parts: Iterable[Grid | str]) -> str:
    """Tables and paragraphs, with an empty line between; titles are not shown."""
    return "\n\n".join(part if isinstance(part, str) else "\n".join(_lines(part)) for part in parts)


def _lines(table: Grid) -> list[str]:
    # A bar or the end of a line inside of a cell does not end it.
    whole = ([_BREAK.sub(" ", cell).replace("|", "\\|") for cell in row] for row in (table.names, *table.rows))
    first, *rest = (f"| {' | '.join(row)} |" for row in whole)
    return [first, "|" + "---|" * len(table.names), *rest]


def begin_mark(command: str) -> str:
    """The line before the output of a command."""
    return f"<!-- made by {command}: do not edit -->"


def end_mark(command: str) -> str:
    """The line after the output of a command."""
    return f"<!-- end of what {command} made -->"


def between_marks(text: str, command: str) -> tuple[str, str, str] | None:
    """The text up to the first mark, between the marks, and from the second on; None without them."""
    before, begin, rest = text.partition(begin_mark(command))
    between, end, after = rest.partition(end_mark(command))
    return (before + begin, between, end + after) if begin and end else None


def update(path: Path, command: str, made: str) -> bool:
    """Write the output of a command between its marks in a file. True if it changed; ValueError without marks."""
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
