"""Commands whose options are the fields of a dataclass, with type, limits, default and help."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

import typer


class Dataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Options = TypeVar("Options", bound=Dataclass)


def command(
    app: typer.Typer, name: str, options: type[Options]
) -> Callable[[Callable[[Options], None]], Callable[[Options], None]]:
    """Decorator: ``function(options)`` becomes the command ``name``.

    Parameters
    ----------
    app : Typer
        Gets the command.
    name : str
    options : type
        A dataclass whose docstring is the help. Its fields are annotated as typer's parameters are:
        ``Annotated[int, typer.Option(help=...)]``.

    Examples
    --------
    >>> @command(app, "demo", Demo)
    ... def demo(options: Demo) -> None:
    ...     print(options.tokens)
    """
    kinds = get_type_hints(options, include_extras=True)
    parameters = [
        inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=_default(one), annotation=kinds[one.name])
        for one in fields(options)
    ]

    def add(function: Callable[[Options], None]) -> Callable[[Options], None]:
        def called(**given: Any) -> None:
            function(options(**given))

        called.__name__, called.__doc__ = function.__name__, options.__doc__
        # Releases of typer read one or the other.
        called.__dict__["__signature__"], called.__annotations__ = inspect.Signature(parameters), kinds
        app.command(name)(called)
        return function

    return add


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return inspect.Parameter.empty if field.default is MISSING else field.default
