"""The native CPU library in the tests: each instruction set that this machine has, and life without the library."""

from __future__ import annotations

import os
from contextlib import contextmanager

from scout_hf.kernels.cpu.library import ISA_VARIABLE, PATH_VARIABLE, load_library

LIBRARY = load_library()
ISAS = LIBRARY.isas() if LIBRARY else ()
WAYS = ("torch", *ISAS)
"""Ways to attend on the CPU: with torch alone, and by the native library with each of its instruction sets."""


@contextmanager
def using_isa(name: str):
    """The library uses this instruction set until the end of the block."""
    before = LIBRARY.isa
    LIBRARY.choose_isa(name)
    try:
        yield
    finally:
        LIBRARY.choose_isa(before)


@contextmanager
def environment(**variables: str):
    """The library is looked for again under these settings, until the end of the block."""
    before = {name: os.environ.pop(name, None) for name in (ISA_VARIABLE, PATH_VARIABLE)}
    isa = LIBRARY.isa if LIBRARY else None
    os.environ.update(variables)
    load_library.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        load_library.cache_clear()
        if isa:
            LIBRARY.choose_isa(isa)


def without_library():
    """What is made within the block does without the library, and nobody warns about it."""
    return environment(**{PATH_VARIABLE: ""})
