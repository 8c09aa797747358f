"""Checks for values from files: each rule is a function that raises ValueError with the path of the wrong value."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Rule = Callable[[Any], None]

LARGEST = 1e18
LONGEST_TEXT = 1 << 16
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def number(low: float = -LARGEST, high: float = LARGEST, whole: bool = False) -> Rule:
    """A number from ``low`` to ``high``, not a bool."""

    def rule(value: Any) -> None:
        kinds = (int,) if whole else (int, float)
        # Written so that NaN is refused.
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            what = "whole number" if whole else "number"
            raise ValueError(f"expected a {what} from {low:g} to {high:g}, got {value!r:.60}")

    return rule


def count(low: int = 0, high: int = 1 << 50) -> Rule:
    """A whole number."""
    return number(low, high, whole=True)


def text(longest: int = LONGEST_TEXT) -> Rule:
    """A string of at most ``longest`` characters, without terminal control characters."""

    def rule(value: Any) -> None:
        if not isinstance(value, str) or len(value) > longest:
            raise ValueError(f"expected a string of at most {longest} characters, got {value!r:.60}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the string {value!r:.60} cannot be encoded ({error.reason})") from error
        if _CONTROL.search(value):
            raise ValueError(f"the string {value!r:.60} has terminal control characters")

    return rule


def flag(value: Any) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r:.60}")


def anything(value: Any) -> None:
    """Any value."""


def simple(value: Any) -> None:
    """Null, true, false, a number or a string."""
    if isinstance(value, str):
        text()(value)
    elif value is not None and not isinstance(value, bool):
        number()(value)


def one_of(*allowed: Any) -> Rule:
    """One of these values, of the same type: 1 is neither true nor 1.0."""

    def rule(value: Any) -> None:
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise ValueError(f"expected one of {', '.join(map(repr, allowed))}, got {value!r:.60}")

    return rule


def maybe(rule: Rule) -> Rule:
    """Null, or a value that passes ``rule``."""

    def either(value: Any) -> None:
        if value is not None:
            rule(value)

    return either


def items(of: Rule, fewest: int = 0, most: int = 1 << 24) -> Rule:
    """A list of ``fewest`` to ``most`` items that all pass a rule."""

    def rule(value: Any) -> None:
        if not isinstance(value, list) or not fewest <= len(value) <= most:
            raise ValueError(f"expected a list of {fewest} to {most} items, got {value!r:.60}")
        for index, one in enumerate(value):
            _within(f"[{index}]", of, one)

    return rule


def table(of: Rule, most: int = 1 << 16) -> Rule:
    """An object with any names whose values all pass a rule."""

    def rule(value: Any) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise ValueError(f"expected an object with at most {most} names, got {value!r:.60}")
        for name, one in value.items():
            text(1024)(name)
            _within(f".{name}", of, one)

    return rule


def fields(needed: Mapping[str, Rule], others: Mapping[str, Rule] | None = None, closed: bool = False) -> Rule:
    """An object with all of ``needed``, optionally ``others``, and, if ``closed``, no other names."""
    known = {**needed, **(others or {})}

    def rule(value: Any) -> None:
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {value!r:.60}")
        if absent := [name for name in needed if name not in value]:
            raise ValueError(f"{', '.join(absent)} is missing")
        if closed and (strange := [name for name in value if name not in known]):
            raise ValueError(f"{strange[0]!r:.60} is unknown; allowed are {', '.join(known)}")
        for name, of in known.items():
            if name in value:
                _within(f".{name}", of, value[name])

    return rule


def _within(where: str, rule: Rule, value: Any) -> None:
    try:
        rule(value)
    except ValueError as error:
        # One line per wrong value, with its path: .cells[3].way: ...
        inner = str(error)
        raise ValueError(where + inner if inner[:1] in ".[" else f"{where}: {inner}") from None
