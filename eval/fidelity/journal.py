"""The results of a study as they come in, one line of JSON each, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SCHEMA = 1


class Journal:
    """A file of results that only grows.

    A line counts for what was asked in it, word for word: cell, effort, versions and weights. One process writes.

    Parameters
    ----------
    path : Path
        Made at the first result; a last line that was cut off is dropped.
    fresh : bool
        Begin anew, whatever is there.
    commit : str or None
        Of the code that measures; a result counts whatever it was measured with, see ``foreign``.
    """

    def __init__(self, path: Path, fresh: bool = False, commit: str | None = None):
        self.path, self.commit = path, commit
        self._found: dict[str, dict[str, Any]] = {}
        self._commits: dict[str, str | None] = {}
        if fresh:
            path.unlink(missing_ok=True)
        elif path.is_file():
            self._read()

    def get(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """The result of exactly this, or None."""
        return self._found.get(_key(asked))

    def foreign(self, asked: dict[str, Any]) -> bool:
        """Whether the result of this was measured at another commit."""
        key = _key(asked)
        return key in self._found and self._commits[key] != self.commit

    def add(self, asked: dict[str, Any], result: dict[str, Any]) -> None:
        """Keep a result; it is on disk when this returns."""
        self.adopt([(asked, result)], self.commit)

    def adopt(self, found: Iterable[tuple[dict[str, Any], dict[str, Any]]], commit: str | None) -> None:
        """Keep results, each with what was asked, that were measured at some commit; all on disk at the end."""
        entries = [{"schema": SCHEMA, "commit": commit, "asked": asked, "result": result} for asked, result in found]
        with self.path.open("a") as file:
            file.writelines(json.dumps(entry, separators=(",", ":")) + "\n" for entry in entries)
            file.flush()
            os.fsync(file.fileno())
        for entry in entries:
            self._remember(entry)

    def _remember(self, entry: dict[str, Any]) -> None:
        key = _key(entry["asked"])
        self._found[key], self._commits[key] = entry["result"], entry["commit"]

    def _read(self) -> None:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                if entry["schema"] == SCHEMA:
                    self._remember(entry)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path}, line {number} is no result of a study; move the file away, or use --fresh"
                ) from error
        if whole != text:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))


def _key(asked: dict[str, Any]) -> str:
    return json.dumps(asked, sort_keys=True)
