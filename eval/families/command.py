"""``scout-hf families``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

from scout_hf.errors import ConfigError
from scout_hf.eval.families import record, report
from scout_hf.eval.families.options import Families
from scout_hf.eval.families.record import nearest
from scout_hf.eval.markdown import to_markdown, update
from scout_hf.eval.tables import show


def run(options: Families, tell: Callable[[str], Any]) -> bool:
    """Show a record, update a page, or check; whether all is well."""
    known, version = record.known(), metadata.version("transformers")
    if not options.check and options.out is not None:
        raise ConfigError("--out is for the record that --check makes; give both")
    if options.page is not None:
        update(options.page, report.COMMAND, to_markdown(report.page(list(known.values()))))
        tell(f"updated {options.page}")
    elif not options.check:
        show(report.tables(_only(record.record_for(version, known), options.type)))
    return not options.check or _checked(options, known, version, tell)


def _checked(options: Families, known: dict[str, Any], version: str, tell: Callable[[str], Any]) -> bool:
    from scout_hf.eval.families import run

    found = record.as_record(run.checked(options.type, options.jobs), version, metadata.version("torch"))
    show(report.tables(found))
    if options.out is not None:
        tell(f"wrote {record.save(found, options.out)}")
    wrong = record.what_is_wrong(found, record.record_for(version, known or {version: found}))
    for line in wrong:
        tell(line)
    return not wrong


def _only(held: dict[str, Any], types: list[str]) -> dict[str, Any]:
    """The same record of these types alone, if any are given."""
    if strange := [name for name in types if name not in held["types"]]:
        hint = nearest(strange[0], held["types"]) or "; scout-hf families lists all"
        raise ConfigError(f"{strange[0]!r} is not in the record of transformers {held['transformers']}{hint}")
    return held | {"types": {name: held["types"][name] for name in types or held["types"]}}
