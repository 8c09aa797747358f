"""The sources of the standard library: which files are trained on and which are held out."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# Third-party code, tests with generated data, tables, and packages that newer versions no longer have.
_LEFT_OUT = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"),
    *("ensurepip", "lib2to3", "distutils"),
}
_HELD_OUT_ONE_IN = 16


def is_held_out(name: str) -> bool:
    """Whether a module, by its path below the root of the library, with forward slashes, is never trained on."""
    digest = hashlib.sha256(PurePosixPath(name).as_posix().encode()).digest()
    return int.from_bytes(digest[:4], "big") % _HELD_OUT_ONE_IN == 0


def module_files(root: Path | None = None) -> dict[str, Path]:
    """Sources of this Python's standard library, or of another root, by name; without those that are no use as text."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    return {
        name: files[name]
        for name in sorted(files)
        if not _LEFT_OUT & {*name.split("/")} and not name.startswith(("config-", "_sysconfigdata"))
    }


def training_files() -> list[str]:
    """The texts to train on, sorted by name."""
    return [_read(path) for name, path in module_files().items() if not is_held_out(name)]


def held_out_files(seed: int) -> Iterator[str]:
    """The texts that are not trained on, in an order that the seed determines."""
    paths = [path for name, path in module_files().items() if is_held_out(name)]
    random.Random(f"held-out-{seed}").shuffle(paths)
    return map(_read, paths)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
