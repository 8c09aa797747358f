"""The results of a study as they come in, one line of JSON each, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scout_hf.errors import ConfigError
from scout_hf.files import LARGEST_BYTES, parse_json
from scout_hf.rules import count, fields, items, maybe, number, table, text

SCHEMA = 1


def _answers(value: Any) -> None:
    text(1 << 20)(value)
    if not value or set(value) - set("01"):
        raise ValueError(f"0 or 1 for each question is wanted, not {value!r:.60}")


_LAYERS = items(maybe(number(-1e6, 1e6)))
_BY_LAYER = ("mass", "output_error", "selection_error", "prediction_error", "block_recall", "cosine")
RESULT = fields(
    {},
    # Nats per token: what is beyond has no perplexity.
    {"right": _answers, "nll": items(number(0, 500), fewest=1), "cpu_ratio_by_step": table(items(number(0, 1e6)))}
    | {"attended_share": number(0, 1e6), "tokens_per_second": number(0)}
    | {name: _LAYERS for name in _BY_LAYER},
)
"""What a result may hold."""
_ENTRY = fields({"commit": maybe(text(200)), "asked": fields({}), "result": RESULT})


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
        # What cannot be read again would spoil the file: ValueError before a byte of it is written.
        for entry in entries:
            _ENTRY(entry)
        lines = [json.dumps(entry, separators=(",", ":"), allow_nan=False) for entry in entries]
        with self.path.open("a") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        for entry in entries:
            self._remember(entry)

    def _remember(self, entry: dict[str, Any]) -> None:
        key = _key(entry["asked"])
        self._found[key], self._commits[key] = entry["result"], entry["commit"]

    def _read(self) -> None:
        if self.path.stat().st_size > LARGEST_BYTES:
            raise ConfigError(f"{self.path} is larger than {LARGEST_BYTES} bytes; move the file away, or use --fresh")
        held = self.path.read_bytes()
        whole = held[: held.rfind(b"\n") + 1]
        for place, line in enumerate(whole.splitlines(), 1):
            try:
                entry = parse_json(line)
                fields({"schema": count()})(entry)
                if entry["schema"] == SCHEMA:
                    _ENTRY(entry)
                    self._remember(entry)
            except ValueError as error:
                raise ConfigError(
                    f"{self.path}, line {place} is no result of a study: {error}; move the file away, or use --fresh"
                ) from error
        if whole != held:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))


def _key(asked: dict[str, Any]) -> str:
    return json.dumps(asked, sort_keys=True)
