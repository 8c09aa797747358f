"""Where transformers' tests come from, and the folder that they are run in. Nothing of them is ever committed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

REPOSITORY = "https://github.com/huggingface/transformers"
NEEDED = ("tests/generation/test_utils.py", "tests/test_modeling_common.py")


class NoTestsError(Exception):
    """The tests can't be had."""


def lay_out(work: Path, source: Path | None, tag: str | None) -> Path:
    """Make a folder to run the tests in; returns the checkout that they are of.

    The tests see the installed transformers as the source tree beside them, never that of the checkout.

    Parameters
    ----------
    work : Path
        A folder that exists and is empty.
    source : Path, optional
        A checkout of transformers, or any folder with its ``tests``.
    tag : str, optional
        Without a checkout: the tag to clone, by default that of the installed release.
    """
    source = clone(work / "clone", tag or f"v{transformers.__version__}") if source is None else source.resolve()
    if missing := [name for name in NEEDED if not (source / name).exists()]:
        raise NoTestsError(f"{source} has no {' and no '.join(missing)}")
    shutil.copytree(source / "tests", work / "tests")
    if (source / "utils").exists():
        shutil.copytree(source / "utils", work / "utils")
    (work / "src").mkdir()
    (work / "src" / "transformers").symlink_to(Path(transformers.__file__).parent)
    if version_of(source) != transformers.__version__:
        for file in released_tests(work / "sdist"):
            shutil.copy(file, work / "tests")
    return source


def version_of(source: Path) -> str | None:
    """The release that a checkout is of, as far as it says."""
    init = source / "src" / "transformers" / "__init__.py"
    found = re.search(r'^__version__ = "(.+)"', init.read_text(encoding="utf-8"), re.M) if init.exists() else None
    return found[1] if found else None


def clone(folder: Path, tag: str) -> Path:
    """The tests alone of one tag."""
    run = [
        ["git", "clone", "-q", "--depth=1", "--filter=blob:none", "--sparse", "--branch", tag, REPOSITORY, str(folder)],
        ["git", "-C", str(folder), "sparse-checkout", "set", "--no-cone", "/tests/", "/utils/"],
        ["git", "-C", str(folder), "sparse-checkout", "add", "/src/transformers/testing_utils.py"],
        ["git", "-C", str(folder), "sparse-checkout", "add", "/src/transformers/__init__.py"],
    ]
    for command in run:
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=_without_prompt())
        except (OSError, subprocess.SubprocessError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise NoTestsError(f"{REPOSITORY} at {tag}: {said[-1] if said else 'no answer'}") from error
    return folder


def released_tests(folder: Path) -> list[Path]:
    """The common test files that the installed release's source archive carries; newer ones do, without the models'."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", "-d", str(folder), f"transformers=={transformers.__version__}"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    except (OSError, subprocess.SubprocessError):
        return []
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as opened:
            members = [member for member in opened.getmembers() if re.fullmatch(r"[^/]+/tests/\w+\.py", member.name)]
            for member in members:
                (folder / Path(member.name).name).write_bytes(opened.extractfile(member).read())
    return sorted(folder.glob("*.py"))


def _without_prompt() -> dict[str, str]:
    return {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
