"""Registries of implementations by name, one per setting that takes a name."""

from __future__ import annotations

import difflib
from typing import Any, Generic, Protocol, TypeVar

from scout_hf.errors import ConfigError


class Named(Protocol):
    """A class with a ``name``."""

    name: str


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """Classes by their ``name``.

    Parameters
    ----------
    setting : str
        The field of ScoutConfig that takes such a name, for error messages.
    also : tuple of str
        Further values of the setting that the caller resolves, such as "auto".
    """

    def __init__(self, setting: str, also: tuple[str, ...] = ()):
        self.setting, self.also = setting, also
        self._classes: dict[str, type[T]] = {}

    def register(self, given: type[T], base: type[Any]) -> type[T]:
        """Add a subclass of ``base`` that sets ``name``; ConfigError if it is not one, or the name is taken."""
        if not isinstance(given, type) or not issubclass(given, base) or not given.name:
            raise ConfigError(
                f"{given!r} is no {self.setting}: register a subclass of {base.__name__} that sets a name"
            )
        if lacking := sorted(getattr(given, "__abstractmethods__", ())):
            raise ConfigError(
                f"{self.setting} {given.name!r} lacks {', '.join(lacking)}; define it in {given.__name__}"
            )
        if self._classes.get(given.name, given) is not given:
            raise ConfigError(f"a {self.setting} named {given.name!r} is registered already; choose another name")
        self._classes[given.name] = given
        return given

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return (*self.also, *sorted(self._classes))

    def find(self, name: str) -> type[T]:
        """The class of that name; ConfigError lists the known names."""
        if name not in self._classes:
            known = ", ".join(map(repr, self.names()))
            near = difflib.get_close_matches(name, self.names(), 1) if isinstance(name, str) else []
            near = near or list(self.also[:1])
            hint = f"; try {near[0]!r}" if near else ""
            raise ConfigError(f"{self.setting}={name!r} is not known; available are {known}{hint}")
        return self._classes[name]
