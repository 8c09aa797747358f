"""Records of model types as tables, for a terminal and for a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from scout_hf.eval.families.kinds import KINDS, NAMED, PROBE, REFUSED, SERVED
from scout_hf.eval.tables import NONE, Grid, by

COMMAND = "scout-hf families"
COLUMNS = {
    "layers": "how many keep their keys and values with scout_hf; the others keep the cache of transformers",
    "prediction": "of a layer's query, on two tiers: exact, if it is what the layer computes of the same input; "
    "off, if none is predicted",
}
"""What the columns of a terminal hold."""


def tables(record: dict[str, Any]) -> Iterator[Grid | str]:
    """For a terminal: what is served, why the others are not, how many there are of each kind, and what words mean."""
    types = record["types"]
    yield f"transformers {record['transformers']}"
    served = {name: one for name, one in types.items() if one["kind"] in SERVED}
    if served:
        grid = Grid("", ("type", "by", "layers", "prediction"), words=4)
        for name, one in served.items():
            grid.add(name, one["kind"], one["layers"], one["prediction"])
        yield grid
    yield from (f"{name}: {one['kind']}: {one['reason']}" for name, one in types.items() if name not in served)
    each = Counter(one["kind"] for one in types.values())
    kinds = [kind for kind in KINDS if each[kind]]
    yield f"{len(types)} type{'s' * (len(types) != 1)}: " + ", ".join(f"{each[kind]} {kind}" for kind in kinds)
    yield from (f"  {kind}: {KINDS[kind]}" for kind in kinds if kind != REFUSED)
    yield from (f"  {column}: {means}" for column, means in COLUMNS.items() if served)


def counts(records: Sequence[dict[str, Any]]) -> Grid:
    """How many types are of each kind, by release."""
    grid = Grid("", ("", *(record["transformers"] for record in records)))
    each = [Counter(one["kind"] for one in record["types"].values()) for record in records]
    for kind, words in KINDS.items():
        if any(one[kind] for one in each):
            grid.add(words, *(str(one[kind]) for one in each))
    grid.add("all types", *(str(sum(one.values())) for one in each))
    return grid


def page(records: Sequence[dict[str, Any]]) -> Iterator[Grid | str]:
    """For the documentation: counts, every type by release, and each reason once, by the newest release."""
    newest = records[-1]
    yield counts(records)
    grid = Grid("", ("type", *(record["transformers"] for record in records), "layers", "prediction"), words=9)
    for name in sorted({name for record in records for name in record["types"]}):
        each = [record["types"].get(name) for record in records]
        last = next(one for one in reversed(each) if one)
        grid.add(f"`{name}`", *(_word(one) for one in each), last["layers"] or NONE, last["prediction"] or NONE)
    yield grid
    why = [(name, one) for name, one in newest["types"].items() if one["kind"] not in SERVED]
    for (kind, reason), those in by(why, lambda one: (one[1]["kind"], _shortened(*one))).items():
        yield f"* {', '.join(f'`{name}`' for name, _ in those)}: {kind}. {reason}"


def _word(one: dict[str, Any] | None) -> str:
    return NONE if one is None else {NAMED: "yes", PROBE: "probe"}.get(one["kind"], one["kind"])


def _shortened(name: str, one: dict[str, Any]) -> str:
    """The reason without the model and without what to do instead, so that others have the same."""
    reason = one["reason"].partition(" is not supported: ")[2] or one["reason"]
    reason = reason.partition(" Use the model unpatched")[0].replace(f"(model type '{name}') ", "")
    return reason.removeprefix(f"{one['model']} ") if one["model"] else reason
