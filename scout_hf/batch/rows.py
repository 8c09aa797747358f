"""Rows in files: JSON Lines and Parquet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scout_hf.errors import ConfigError, MissingFileError
from scout_hf.files import parse_json, whole_file

LINES, PARQUET = (".jsonl", ".ndjson"), (".parquet",)
COLUMNS = ("id", "answer", "error", "prompt_tokens", "new_tokens", "key")
"""Of a finished row."""

Row = dict[str, Any]


def check_kind(path: Path) -> None:
    """ConfigError for a file whose name says neither JSON Lines nor Parquet, or if Parquet cannot be had."""
    if path.suffix not in LINES + PARQUET:
        raise ConfigError(
            f"{path} is not allowed: rows are in files that end in {', '.join(LINES + PARQUET)}; try "
            f"{path.with_suffix('.jsonl')}"
        )
    if path.suffix in PARQUET:
        _parquet(path)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file.

    Raises
    ------
    MissingFileError
        If it is not there.
    ConfigError
        If it is no such file, or a line is no JSON object.
    """
    check_kind(path)
    if not path.is_file():
        raise MissingFileError(f"{path} is missing, or is not a file")
    if path.suffix in PARQUET:
        try:
            return _parquet(path)[1].read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as Parquet: {error}") from error
    held = enumerate(path.read_bytes().split(b"\n"), 1)
    return [row for number, line in held if (row := _row(path, number, line)) is not None]


def _row(path: Path, number: int, line: bytes) -> Row | None:
    if not line.strip():
        return None
    try:
        row = parse_json(line)
        if not isinstance(row, dict):
            raise ValueError(f"it is of type {type(row).__name__}")
    except ValueError as error:
        raise ConfigError(
            f'{path}, line {number}, is not one JSON object ({error}); try {{"prompt": "..."}} on a line of its own'
        ) from error
    return row


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write finished rows; ``path`` is replaced at once, and unchanged after an error."""
    if path.suffix in PARQUET:
        arrow, parquet = _parquet(path)
        number = arrow.int64()
        kinds = {"id": number if isinstance(rows[0]["id"], int) else arrow.string(), "prompt_tokens": number}
        kinds |= {"new_tokens": number}
        schema = arrow.schema([(name, kinds.get(name, arrow.string())) for name in COLUMNS])
        with whole_file(path, binary=True) as file:
            parquet.write_table(arrow.Table.from_pylist(list(rows), schema), file)
        return
    with whole_file(path) as file:
        file.writelines(as_line(row) for row in rows)


def as_line(row: Row) -> str:
    """A row as one line of JSON, with its end."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def _parquet(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"{path} needs pyarrow, which is not installed: pip install 'scout_hf[parquet]', or take JSON Lines"
        ) from error
    return pyarrow, pyarrow.parquet
