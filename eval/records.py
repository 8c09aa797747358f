"""Results that later runs resume from, and records that are read back and checked."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scout_hf.errors import ConfigError
from scout_hf.eval import rules
from scout_hf.files import LARGEST_BYTES, parse_json, read_json, write_text
from scout_hf.rules import count, fields

REMEDY = "give a JSON file that `scout-hf bench` or `scout-hf fidelity` wrote, or leave it out"
AGAIN = ("missing", "failed")
"""Outcomes that are measured again: what was missing may be installed by now."""

SCHEMA = 1


class Record:
    """Results of many cells in one JSON file, written atomically after each cell; a later run resumes from it.

    Without a path, or with ``fresh``, nothing is resumed. ``held`` is a new record: its kind, settings and machine. A
    file that is there keeps the ``rule``, or ConfigError, and has by ``same`` the same settings, or ValueError; its
    parts that are named in ``kept`` are taken over.
    """

    def __init__(
        self,
        path: Path | None,
        fresh: bool,
        held: dict[str, Any],
        rule: Callable[[Any], object],
        same: Callable[[dict[str, Any]], dict[str, Any]],
        kept: Iterable[str] = ("cells",),
    ):
        self.path, self.held, self.run = path, held, time.strftime("%Y-%m-%d %H:%M:%S")
        if path is None or fresh or not path.exists():
            return
        before = read_json(path, rule, "give another --out, or --fresh to write over it")
        theirs, ours = same(before), same(held)
        names = [*ours, *(name for name in theirs if name not in ours)]
        if differ := [f"{name}={theirs.get(name)!r}" for name in names if theirs.get(name) != ours.get(name)]:
            raise ValueError(
                f"{path} holds figures with {', '.join(differ)}, which differs from the settings of this run; give the "
                "same settings to resume, --fresh to start again, or another --out"
            )
        self.held |= {name: before[name] for name in kept if name in before}

    def at(self, cell: dict[str, Any], part: str = "cells") -> list[dict[str, Any]]:
        """All results of this cell, failures included; a cell without ``gib`` matches only results without it."""
        named = {"gib": None} | cell
        return [one for one in self.held[part] if all(one.get(name) == value for name, value in named.items())]

    def has(self, cell: dict[str, Any], part: str = "cells") -> bool:
        """Whether the cell has a result that need not be measured again."""
        return any(not any(name in one for name in AGAIN) for one in self.at(cell, part))

    def foreign(self, cell: dict[str, Any]) -> bool:
        """Whether the result of this was measured at another commit, as far as that is known."""
        here = self.held["machine"]["commit"]
        return any(one.get("commit", here) != here for one in self.at(cell))

    def add(self, cell: dict[str, Any], found: dict[str, Any], part: str = "cells") -> None:
        """Add or replace the result of a cell, and write the file."""
        before, commit = self.at(cell, part), self.held.get("machine", {}).get("commit")
        rest = [one for one in self.held[part] if one not in before]
        self.held[part] = [*rest, cell | found | {"run": self.run, "commit": commit}]
        self.write()

    def write(self) -> None:
        """Write the file atomically."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_record(self.held, self.path)


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write a record as JSON, lists of numbers on one line."""
    text = json.dumps(record, indent=1, allow_nan=False)
    write_text(path, re.sub(r"\[[-+\d.e,\s]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n")


class Journal:
    """Results one line of JSON each, in a file that only grows; for many cells that are measured at the same time.

    A line counts for what was asked in it, word for word, whatever code measured it; its result keeps the ``rule``. A
    last line that was cut off is dropped. One process writes.
    """

    def __init__(self, path: Path, rule: Callable[[Any], object], fresh: bool = False, commit: str | None = None):
        self.path, self.commit = path, commit
        self._rule = fields({"commit": rules.MAYBE_WORD, "asked": fields({}), "result": rule})
        self._found: dict[str, dict[str, Any]] = {}
        if fresh:
            path.unlink(missing_ok=True)
        elif path.is_file():
            self._read()

    def get(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """The result of exactly this, or None."""
        return self._found.get(_key(asked), {}).get("result")

    def others(self, part: dict[str, Any], asked: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """What was asked besides ``asked``, in the order measured, of all results that agree with ``part``."""
        known = {_key(one) for one in asked}
        entries = (entry["asked"] for key, entry in self._found.items() if key not in known)
        return [one for one in entries if all(one.get(name) == value for name, value in part.items())]

    def add(self, asked: dict[str, Any], result: dict[str, Any]) -> None:
        """Keep a result; it is on disk when this returns."""
        entry = {"schema": SCHEMA, "commit": self.commit, "asked": asked, "result": result}
        # What cannot be read again would spoil the file: ValueError before a byte of it is written.
        self._rule(entry)
        line = json.dumps(entry, separators=(",", ":"), allow_nan=False)
        with self.path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._found[_key(asked)] = entry

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
                    self._rule(entry)
                    self._found[_key(entry["asked"])] = entry
            except ValueError as error:
                raise ConfigError(
                    f"{self.path}, line {place} is not a result of a study: {error}; move the file away, or use --fresh"
                ) from error
        if whole != held:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))


def _key(asked: dict[str, Any]) -> str:
    return json.dumps(asked, sort_keys=True)


# -- reading back ---------------------------------------------------------------------------------------------------


def kind_of(record: dict[str, Any]) -> str:
    """The benchmark that a record is of; records of the fidelity study have no name."""
    kind = record.get("benchmark") or ("fidelity" if "study" in record else "")
    return kind if isinstance(kind, str) else ""


def read_record(path: Path, *kinds: str) -> dict[str, Any]:
    """The record in a file, one of these kinds, or any.

    ConfigError if it is missing, too large or deep, none of these records, or lacks what its tables are made of.
    """
    # What a study may be of is known to those who measure it, who import torch.
    from scout_hf.eval.language.study import RULE as fidelity

    def rule(found: Any) -> None:
        if not isinstance(found, dict):
            raise ValueError(f"it holds one of type {type(found).__name__}, not an object")
        known, kind = rules.BENCHMARKS | {"fidelity": fidelity}, kind_of(found)
        if kind not in known:
            raise ValueError("it is not a result of `scout-hf bench` or `scout-hf fidelity`")
        if kinds and kind not in kinds:
            raise ValueError(f"it is a record of {kind}; give one of {' or '.join(kinds)}")
        known[kind](found)

    return read_json(path, rule, REMEDY)


@contextmanager
def shown(path: Path) -> Iterator[None]:
    """Within this a record is made into tables; where it does not hang together, ConfigError says of which file."""
    try:
        yield
    except (LookupError, TypeError, ArithmeticError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be shown: {type(error).__name__}: {error}; was it changed by hand, or made by another "
            "version? Make it again"
        ) from error
