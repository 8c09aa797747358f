"""What a check found with one release of transformers, as JSON beside this file, and what a later one has lost."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scout_hf.errors import ConfigError
from scout_hf.eval.families.kinds import KINDS, SERVED, UNBUILT, WRONG, Found
from scout_hf.eval.records import write_record
from scout_hf.eval.rules import WORD
from scout_hf.files import read_json
from scout_hf.rules import fields, flag, maybe, number, one_of, table, text

FOLDER = Path(__file__).parent / "records"
FOUND = {
    "kind": one_of(*KINDS),
    "reason": text(),
    "model": WORD,
    "error": maybe(number(0, 1)),
    "padded": maybe(flag),
    "layers": WORD,
    "prediction": WORD,
}
RULE = fields(
    {"benchmark": one_of("families"), "transformers": WORD, "torch": WORD, "types": table(fields(FOUND, closed=True))}
)


def known(folder: Path = FOLDER) -> dict[str, dict[str, Any]]:
    """The records by release, oldest first."""
    found = {path.stem: read_json(path, RULE, "make it again") for path in folder.glob("*.json")}
    return dict(sorted(found.items(), key=lambda one: number_of(one[0])))


def number_of(version: str) -> tuple[int, ...]:
    """``5.17.0`` as (5, 17, 0)."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def record_for(version: str, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The record of this release, or of the newest before it. ConfigError if there is none."""
    before = [name for name in records if number_of(name) <= number_of(version)]
    if not before:
        raise ConfigError(
            f"there is no record of model types for transformers {version}, nor for one before it; make it with "
            "scout-hf families --check --out FOLDER"
        )
    return records[before[-1]]


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint for a name that is not among the others: what may be meant; empty if nothing is near."""
    near = difflib.get_close_matches(name, list(names), 3)
    return f"; did you mean {', '.join(map(repr, near))}?" if near else ""


def as_record(found: dict[str, Found], transformers: str, torch: str) -> dict[str, Any]:
    """The record of a check."""
    types = {name: _rounded(asdict(one)) for name, one in found.items()}
    return {"benchmark": "families", "transformers": transformers, "torch": torch, "types": types}


def _rounded(found: dict[str, Any]) -> dict[str, Any]:
    error = found["error"]
    return found if error is None else found | {"error": float(f"{error:.0e}")}


def save(record: dict[str, Any], folder: Path) -> Path:
    """Write the record into a folder."""
    RULE(record)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['transformers']}.json"
    write_record(record, path)
    return path


def what_is_wrong(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What this check must not find: a wrong type, or less than the record has of the types that were tried.

    A type that another release of transformers does not have, or cannot build, is not lost.
    """
    said = []
    same = now["transformers"] == before["transformers"]
    for name, one in now["types"].items():
        was = before["types"].get(name, {"kind": UNBUILT, "prediction": ""})
        if one["kind"] == WRONG:
            said.append(f"{name} is wrong: {one['reason']}")
        elif was["kind"] in SERVED and one["kind"] not in SERVED and (same or one["kind"] != UNBUILT):
            said.append(f"{name} was served with transformers {before['transformers']}, and is now {_now(one)}")
        elif one["kind"] in SERVED and was["prediction"] == "exact" != one["prediction"]:
            said.append(f"{name}: queries were predicted, and are no longer: {one['prediction']}")
    return said


def _now(one: dict[str, Any]) -> str:
    return f"{one['kind']}: {one['reason']}" if one["reason"] else one["kind"]
