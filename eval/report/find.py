"""Finds the files for a page, before heavy imports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scout_hf.errors import ConfigError

FILES = ("methods", "fidelity", "cpu_decode", "cpu_kernel", "gpu", "sessions", "rivals", "drafts")


def find(given: Sequence[Path], out: Path | None = None) -> list[Path]:
    """The given files, and files with known names in the given folders; ConfigError if there are none."""
    if missing := [path for path in given if not path.exists()]:
        raise ConfigError(f"{missing[0]} is missing; give JSON files of `scout-hf bench` or `fidelity`, or folders")
    found = [path for one in given for path in ([one] if one.is_file() else [one / f"{name}.json" for name in FILES])]
    found = [path for path in found if path.exists()]
    if not found:
        names = ", ".join(f"{name}.json" for name in FILES)
        raise ConfigError(f"no results in {', '.join(map(str, given))}; looked for {names}: run `scout-hf bench` first")
    if out is not None and out.is_dir():
        raise ConfigError(f"--out {out} is a folder; give the name of a page, such as {out / 'report.html'}")
    return found
