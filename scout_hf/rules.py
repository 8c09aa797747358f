"""Rules that values from a file must keep: each is a function that raises ValueError, which says where and what."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Rule = Callable[[Any], None]

LARGEST = 1e18
LONGEST_TEXT = 1 << 16
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def number(low: float = -LARGEST, high: float = LARGEST, whole: bool = False) -> Rule:
    """A number from ``low`` to ``high``; true and false are none."""

    def rule(value: Any) -> None:
        kinds = (int,) if whole else (int, float)
        # Not "value < low": nothing is below or above what is not a number.
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            what = "whole number" if whole else "number"
            raise ValueError(f"a {what} from {low:g} to {high:g} is wanted, not {value!r:.60}")

    return rule


def count(low: int = 0, high: int = 1 << 50) -> Rule:
    """A whole number."""
    return number(low, high, whole=True)


def text(longest: int = LONGEST_TEXT) -> Rule:
    """A string of no more than so many characters, which a file and a terminal take as they are."""

    def rule(value: Any) -> None:
        if not isinstance(value, str) or len(value) > longest:
            raise ValueError(f"a string of at most {longest} characters is wanted, not {value!r:.60}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the string {value!r:.60} has half a character ({error.reason})") from error
        if _CONTROL.search(value):
            raise ValueError(f"the string {value!r:.60} has characters that control a terminal")

    return rule


def flag(value: Any) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"true or false is wanted, not {value!r:.60}")


def anything(value: Any) -> None:
    """No rule."""


def simple(value: Any) -> None:
    """Null, true, false, a number or a string."""
    if isinstance(value, str):
        text()(value)
    elif value is not None and not isinstance(value, bool):
        number()(value)


def one_of(*allowed: Any) -> Rule:
    """One of these values; 1 is not true, and 1.0 is not 1."""

    def rule(value: Any) -> None:
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ValueError(f"one of {', '.join(map(repr, allowed))} is wanted, not {value!r:.60}")

    return rule


def maybe(rule: Rule) -> Rule:
    """Null, or what keeps the rule."""

    def either(value: Any) -> None:
        if value is not None:
            rule(value)

    return either


def items(of: Rule, fewest: int = 0, most: int = 1 << 24) -> Rule:
    """A list whose items all keep a rule."""

    def rule(value: Any) -> None:
        if not isinstance(value, list) or not fewest <= len(value) <= most:
            raise ValueError(f"a list of {fewest} to {most} items is wanted, not {value!r:.60}")
        for index, one in enumerate(value):
            _within(f"[{index}]", of, one)

    return rule


def table(of: Rule, most: int = 1 << 16) -> Rule:
    """An object with any names, whose values all keep a rule."""

    def rule(value: Any) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise ValueError(f"an object with at most {most} names is wanted, not {value!r:.60}")
        for name, one in value.items():
            text(1024)(name)
            _within(f".{name}", of, one)

    return rule


def fields(needed: Mapping[str, Rule], others: Mapping[str, Rule] | None = None, closed: bool = False) -> Rule:
    """An object that has all of ``needed`` and perhaps ``others``, and where ``closed`` nothing else."""
    known = {**needed, **(others or {})}

    def rule(value: Any) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"an object is wanted, not {value!r:.60}")
        if absent := [name for name in needed if name not in value]:
            raise ValueError(f"{', '.join(absent)} is missing")
        if closed and (strange := [name for name in value if name not in known]):
            raise ValueError(f"{strange[0]!r:.60} is unknown; there are {', '.join(known)}")
        for name, of in known.items():
            if name in value:
                _within(f".{name}", of, value[name])

    return rule


def _within(where: str, rule: Rule, value: Any) -> None:
    try:
        rule(value)
    except ValueError as error:
        # One line per value that is wrong, with the way to it: .cells[3].way: ...
        inner = str(error)
        raise ValueError(where + inner if inner[:1] in ".[" else f"{where}: {inner}") from None
