"""Changes to a model that can be undone. Undoing works also before the change was made, and twice."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Attribute:
    """Sets a name in a module's ``__dict__``, and restores what was there when this object was made.

    Parameters
    ----------
    module : Module
    name : str
    value : object
    keep_others : bool
        Keep a value that somebody else has set there since, instead of restoring the one before.
    """

    def __init__(self, module: nn.Module, name: str, value: Any, keep_others: bool = False):
        self._module, self._name, self._value, self._keep_others = module, name, value, keep_others
        own = module.__dict__
        self._before = {name: own[name]} if name in own else {}

    def __enter__(self) -> None:
        self._module.__dict__[self._name] = self._value

    def __exit__(self, *error: object) -> None:
        own = self._module.__dict__
        if not self._keep_others or own.get(self._name) is self._value:
            own.pop(self._name, None)
            own.update(self._before)


class Hook:
    """Registers a hook with ``register``, a method of a module, and removes it."""

    def __init__(self, register: Callable[..., RemovableHandle], function: Callable[..., Any], **options: Any):
        self._register, self._function, self._options = register, function, options
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> None:
        self._handle = self._register(self._function, **self._options)

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            self._handle.remove()


class Changes:
    """Changes that are undone together, and copied with their model.

    Unlike ``contextlib.ExitStack``, a deep copy undoes the changes of the copied model, and after an error all changes
    can be undone again.
    """

    def __init__(self) -> None:
        self._made: list[AbstractContextManager[Any]] = []

    def make(self, change: AbstractContextManager[Any]) -> None:
        """Enter a change; one that fails or is interrupted is undone with the others."""
        self._made.append(change)
        change.__enter__()

    def undo(self) -> None:
        """Undo all, the newest first, and drop them; after an error (see :func:`call_all`) all are kept."""
        call_all(*(functools.partial(change.__exit__, None, None, None) for change in reversed(self._made)))
        self._made.clear()


def call_all(*functions: Callable[[], Any]) -> None:
    """Call all functions, whatever they raise; then raise the first error, an interrupt before other errors."""
    errors: list[BaseException] = []
    for function in functions:
        try:
            function()
        except BaseException as error:
            errors.append(error)
    if errors:
        raise next((error for error in errors if not isinstance(error, Exception)), errors[0])
