"""Triton's interpreter, faster: it would patch its language at each call of a device function, a third of all time."""

from __future__ import annotations

import sys
from contextlib import contextmanager


@contextmanager
def patched_once_a_launch():
    """Within a launch each language module is patched for the first function that sees it, not for all others."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        yield
        return
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    language, launches = interpreter.tl, []

    def once(fn):
        seen = {id(value) for value in fn.__globals__.values() if value is language or value is language.core}
        if launches and seen <= launches[-1]:
            return interpreter._LangPatchScope()
        if launches:
            launches[-1] |= seen
        return patch(fn)

    def launched(executor, *args, **options):
        launches.append(set())
        try:
            return launch(executor, *args, **options)
        finally:
            launches.pop()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched
    try:
        yield
    finally:
        interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launch
