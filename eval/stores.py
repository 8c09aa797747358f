"""The prefix store that a command uses."""

from __future__ import annotations

from pathlib import Path

from scout_hf import PrefixStore
from scout_hf.errors import ConfigError, MissingFileError, ScoutError
from scout_hf.eval.language.packaged import cache_folder

NAME = "store"


def usual_folder() -> Path:
    """Where texts are kept without ``--store``: beside the packaged models."""
    return cache_folder() / NAME


def open_store(
    folder: Path | None, limit: str | None, there: bool = False, option: str = "--store-limit"
) -> PrefixStore:
    """The store of ``--store`` and ``--store-limit``.

    Parameters
    ----------
    folder : Path or None
        None: :func:`usual_folder`.
    limit : str or None
    there : bool
        Whether it must be there already.
    option : str
        What the limit is called, for messages.

    Raises
    ------
    ConfigError
        If it cannot be used, or the limit is no size.
    MissingFileError
        If it must be there and is not.
    """
    folder = (folder or usual_folder()).expanduser()
    if there and not folder.is_dir():
        raise MissingFileError(f"there is no store {folder}; scout-hf read MODEL TEXT makes one, or name another one")
    try:
        return PrefixStore(folder, **({"limit": limit} if limit else {}))
    except ScoutError:
        raise
    except ValueError as error:
        raise ConfigError(f"{option} {limit} is not allowed: bytes, such as 20GiB") from error
    except OSError as error:
        raise ConfigError(f"--store {folder} cannot be used: {error}") from error
