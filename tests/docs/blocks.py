"""Code blocks and links of the README and of docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_MADE = ROOT / "docs" / "cli.md"  # by `make docs`
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {_MADE})]
_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
_LINK = re.compile(r"\[[^\]]+\]\((?!https?:)([^)#]+)")


class Block(NamedTuple):
    """One fenced block.

    line : int
        Of the page, where its code begins.
    """

    language: str
    code: str
    line: int


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a page in that language, in order."""
    text = page.read_text(encoding="utf-8")
    found = (Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in _BLOCK.finditer(text))
    return [block for block in found if block.language == language]


def commands(page: Path) -> list[str]:
    """The command lines of a page's bash blocks, without comments, continued lines joined."""
    joined = "\n".join(block.code for block in blocks(page, "bash")).replace("\\\n", " ")
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def links(page: Path) -> list[str]:
    """Where the relative links of a page lead."""
    return _LINK.findall(_BLOCK.sub("", page.read_text(encoding="utf-8")))


def name(page: Path) -> str:
    """The page, for test names."""
    return str(page.relative_to(ROOT))
