"""What is done: a journal beside the output, to which each finished row is added, and the output itself at the end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from scout_hf.batch.prompts import Prompt
from scout_hf.batch.rows import COLUMNS, Row, as_line, check_kind, read_rows, write_rows
from scout_hf.batch.settings import Settings
from scout_hf.errors import ConfigError
from scout_hf.files import locked_file, parse_json

FORMAT = "scout_hf.batch/1"
SUFFIX = ".part"


class Ledger:
    """Finished rows of one output.

    Parameters
    ----------
    path : Path
        The output: it is written at once when all rows are there, in the order of the input.
    settings : dict
        Of this run.

    Attributes
    ----------
    rows : dict
        By their ids.
    journal : Path
        Rows in the order in which they were finished, while the output is not complete.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.journal, self._settings = path, path.with_name(path.name + SUFFIX), settings
        self.rows: dict[int | str, Row] = {}
        self.weights: str | None = None
        self._begun_with = settings
        self._file: IO[bytes] | None = None

    @classmethod
    @contextlib.contextmanager
    def opened(cls, path: Path, settings: Settings) -> Iterator[Ledger]:
        """The ledger of an output, with what is done; nobody else can open it meanwhile.

        Raises
        ------
        ConfigError
            If another run has it open, or what is there was not written by a run.
        OSError
            If its folder is missing or cannot be written to.
        """
        check_kind(path)
        made = cls(path, settings.as_json())
        try:
            with locked_file(made.journal, 0.0), contextlib.closing(made):
                made._read()
                yield made
        except TimeoutError as error:
            raise ConfigError(f"another run is writing {path}; wait for it, or name another file") from error

    def close(self) -> None:
        """Close the journal; one without rows is removed."""
        if self._file is not None:
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            if not self.journal.stat().st_size:
                self.journal.unlink()

    def _read(self) -> None:
        if self.path.exists():
            found = read_rows(self.path)
            if not all(set(row) == set(COLUMNS) for row in found):
                raise ConfigError(
                    f"{self.path} is there, and not what a batch wrote; name another file, or move it away"
                )
            self.rows = {row["id"]: row for row in found}
        held = self.journal.read_bytes()
        whole = held[: held.rfind(b"\n") + 1]
        if len(whole) < len(held):
            # A process that was killed left half a row.
            os.truncate(self.journal, len(whole))
        lines = whole.split(b"\n")[:-1]
        if len(lines) == 1:
            # Killed before its first row: nothing binds the next run.
            os.truncate(self.journal, 0)
            lines = []
        for number, line in enumerate(lines, 1):
            try:
                row = parse_json(line)
                if number == 1:
                    if row["format"] != FORMAT:
                        raise ValueError(f"it has the format {row['format']!r}, and {FORMAT!r} is known")
                    self._begun_with = row["settings"]
                else:
                    self.weights = row.pop("weights") or self.weights
                    self.rows[row["id"]] = {name: row[name] for name in COLUMNS}
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{self.journal}, line {number}, is not what a batch wrote ({error!r}); remove this line, or the "
                    "whole file to begin anew"
                ) from error

    def refuse_others(self, prompts: Sequence[Prompt]) -> None:
        """ConfigError if a row is done with another prompt or other settings, or is not among these prompts."""
        keys = {one.id: one.key for one in prompts}
        other = next((row for row in self.rows.values() if keys.get(row["id"]) != row["key"]), None)
        changed = sorted(
            name
            for name in self._begun_with.keys() | self._settings.keys()
            if self._begun_with.get(name) != self._settings.get(name)
        )
        if changed:
            shown = ", ".join(f"{name}={self._begun_with.get(name)!r}" for name in changed)
            now = ", ".join(f"{name}={self._settings.get(name)!r}" for name in changed)
            raise ConfigError(
                f"{self.path} was begun with {shown}, and this run has {now}; a run goes on with the same settings "
                f"alone: give those, name another output, or remove {self.journal}"
            )
        if other is None:
            return
        if other["id"] not in keys:
            raise ConfigError(
                f"{self.path} has an answer to row {other['id']!r}, and there is no such row any more; a run goes on "
                "with the same rows, and with more of them: give those, or name another output"
            )
        raise ConfigError(
            f"row {other['id']!r} in {self.path} was answered for another prompt or with other settings; a run goes on "
            "with the same ones alone: give those, or name another output"
        )

    def add(self, row: Row, weights: str | None) -> None:
        """Add a finished row, which is on disk when this returns; ConfigError if it is of another model."""
        if weights and self.weights and weights != self.weights:
            raise ConfigError(
                f"the rows so far in {self.journal} were answered by other weights (another checkpoint, adapter or "
                "dtype) than this model or worker has: load those, or name another output"
            )
        if self._file is None:
            self._file = self.journal.open("ab")
            if not self.journal.stat().st_size:
                self._put({"format": FORMAT, "settings": self._settings})
        self._put({**row, "weights": weights})
        self.rows[row["id"]], self.weights = row, weights or self.weights

    def _put(self, line: Row) -> None:
        if self._file is None:
            raise ValueError("the journal is not open")
        self._file.write(as_line(line).encode(errors="replace"))
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, prompts: Sequence[Prompt]) -> None:
        """Write the output, in the order of these prompts, and remove the journal."""
        if self.journal.stat().st_size:
            write_rows(self.path, [self.rows[one.id] for one in prompts])
            self.journal.unlink()
