"""The folder of a session: ``session.json`` says what it is, two safetensors files hold it."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
import xxhash

from scout_hf.errors import SavingError, SessionError
from scout_hf.files import clear_scratch, open_regular, whole_folder
from scout_hf.session_file import ABOUT, FORMAT, hash_of, read_about
from scout_hf.sessions.container import map_pages, write_pages
from scout_hf.sessions.mapped import OpenFile
from scout_hf.sessions.tree import Flat, flatten, unflatten
from scout_hf.sessions.writing import write_tensors
from scout_hf.stores.state import Pages, State

PAGES, TENSORS = "pages.safetensors", "tensors.safetensors"
PRIVATE = 0o700
SUMS = "sums"


@dataclass(frozen=True)
class Session:
    """What a session holds.

    Attributes
    ----------
    model : dict
        The fingerprint of its model.
    settings : dict
        Fields of its ScoutConfig, as JSON has them.
    state : dict
        Of the cache; tensors are on the CPU, pages are mapped.
    about : dict
        Further facts: tokens, rows.
    made : dict of str
        When, and by which versions.
    file : OpenFile or None
        The file that is mapped, to be checked before its pages are used.
    pages : tuple of Pages
        All that are mapped.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    state: State
    about: dict[str, Any]
    made: dict[str, str]
    file: OpenFile | None = None
    pages: tuple[Pages, ...] = ()

    def check_pages(self) -> None:
        """Read all pages; SessionError if one is not what was written."""
        for pages in self.pages:
            for guard, slab in zip(pages.guards, pages.slabs):
                guard.touch(torch.arange(len(slab), dtype=torch.int64, device="cpu"))


def write_session(
    path: str | os.PathLike[str],
    model: dict[str, Any],
    settings: dict[str, Any],
    state: State,
    about: dict[str, Any],
    unchanged: Callable[[], None] = lambda: None,
) -> None:
    """Write a session: the whole folder or nothing, readable by its owner only.

    Parameters
    ----------
    path : path-like
        Nothing, an empty folder, or a session, which is replaced.
    model, settings, state, about
        As in :class:`Session`.
    unchanged : callable
        Raises if the state changed while it was being written; nothing is left then.

    Raises
    ------
    SavingError
        If ``path`` is something else, or a state is not plain data.
    OSError
        If the disk is full or the folder cannot be written to.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    refuse_other_files(path)
    clear_scratch(path)
    try:
        _write_into(path, model, settings, flatten(state), about, unchanged)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _write_into(
    path: Path,
    model: dict[str, Any],
    settings: dict[str, Any],
    flat: Flat,
    about: dict[str, Any],
    unchanged: Callable[[], None],
) -> None:
    made = {
        "at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "scout_hf": version("scout_hf"),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    with whole_folder(path, mode=PRIVATE, replace=True) as folder:
        written = write_pages(folder / PAGES, flat.pages)
        tensors = dict(flat.tensors)
        for name, pages in flat.pages.items():
            tensors[f"{name}/order"] = pages.order
            if name in written.sums:
                tensors[f"{name}/{SUMS}"] = written.sums[name]
        size, seen = write_tensors(folder / TENSORS, tensors)
        said = {
            "format": FORMAT,
            "made": made,
            "model": model,
            "settings": settings,
            "about": about,
            "pages": {"bytes": written.size, "header": written.header, "names": list(flat.pages)},
            "tensors": {"bytes": size, "hash": seen},
            "state": flat.tree,
        }
        said["hash"] = hash_of(said)
        (folder / ABOUT).write_text(json.dumps(said, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        unchanged()


def refuse_other_files(path: Path) -> None:
    """Raise SavingError if a session cannot be written there without losing something else."""
    if path.is_dir():
        names = os.listdir(path)
        if names and ABOUT not in names:
            raise SavingError(f"{path} is a folder that holds no session ({names[0]}, ...); take another name")
    elif os.path.lexists(path):
        raise SavingError(f"{path} is there and no session; take another name")


def read_session(path: str | os.PathLike[str]) -> Session:
    """Open a session: tensors are read and checked, pages are mapped, and checked when they are first wanted.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    Session

    Raises
    ------
    SessionError
        If there is none, or it is damaged or of another format.
    """
    path = Path(path)
    said = read_about(path)
    tensors = _read_tensors(path / TENSORS, said["tensors"])
    sums = {name: tensors.pop(f"{name}/{SUMS}") for name in said["pages"]["names"] if f"{name}/{SUMS}" in tensors}
    file, mapped = map_pages(path / PAGES, said["pages"]["bytes"], said["pages"]["header"], sums)
    pages = {}
    for name in said["pages"]["names"]:
        order = tensors.pop(f"{name}/order", None)
        if order is None:
            raise SessionError(f"{path} has no table for {name}: it is damaged")
        held = mapped.get(name)
        pages[name] = Pages(order, ()) if held is None else Pages(order, (held.slab,), (held,))
    state = unflatten(Flat(said["state"], tensors, pages), torch.device("cpu"))
    return Session(said["model"], said["settings"], state, said["about"], said["made"], file, tuple(pages.values()))


def _read_tensors(path: Path, said: dict[str, Any]) -> dict[str, torch.Tensor]:
    try:
        with open_regular(path) as file:
            data = file.read()
    except OSError as error:
        raise SessionError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) != said["bytes"] or xxhash.xxh3_128_hexdigest(data) != said["hash"]:
        raise SessionError(f"{path} is damaged: it is not what was written")
    try:
        return safetensors.torch.load(data)
    except Exception as error:
        raise SessionError(f"{path} cannot be read: {error}") from error


def remove_session(path: str | os.PathLike[str]) -> None:
    """Remove a session, and only if it is one; caches that were opened from it keep their pages."""
    path = Path(path)
    read_about(path)
    shutil.rmtree(path)
