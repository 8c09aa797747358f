"""Settings as they are given on the command line: ``--set name=value``."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

from scout_hf import ConfigError

_OUTSIDE = re.compile(r",(?![^(\[{]*[)\]}])")
"""Commas between values, not those inside of one."""


def values_of(given: Sequence[str]) -> dict[str, list[Any]]:
    """The values listed for each setting, such as 16 and 32 for ``["block_size=16,32"]``; ConfigError for other texts.

    Examples
    --------
    >>> from scout_hf.eval.settings import values_of
    >>> values_of(["mass=none,0.9", "dense_layers=(0,1)"])
    {'mass': [None, 0.9], 'dense_layers': [(0, 1)]}
    """
    found = {}
    for one in given:
        name, equals, values = one.partition("=")
        if not equals or not name.strip() or not values.strip():
            raise ConfigError(f"--set {one} is not allowed: a setting and its values, such as block_size=16,32")
        found[name.strip()] = [value_of(value) for value in _OUTSIDE.split(values)]
    return found


def single_values_of(given: Sequence[str]) -> dict[str, Any]:
    """As :func:`values_of`, for commands that take one value of each setting.

    Examples
    --------
    >>> from scout_hf.eval.settings import single_values_of
    >>> single_values_of(["mass=0.95"])
    {'mass': 0.95}
    """
    found = values_of(given)
    for name, values in found.items():
        if len(values) > 1:
            raise ConfigError(f"--set {name} is not allowed with {len(values)} values here: one, such as mass=0.95")
    return {name: value for name, (value,) in found.items()}


def value_of(text: str) -> Any:
    """A value as Python writes it, or none, true and false; else the word itself.

    Examples
    --------
    >>> from scout_hf.eval.settings import value_of
    >>> value_of("0.06"), value_of("none"), value_of("sign")
    (0.06, None, 'sign')
    """
    word = text.strip()
    try:
        return ast.literal_eval({"none": "None", "true": "True", "false": "False"}.get(word.lower(), word))
    except (ValueError, SyntaxError):
        return word
