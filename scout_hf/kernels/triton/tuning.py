"""Sizes that the decode kernel is compiled with: a small set, measured once per chip and shape, kept in a JSON file."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from scout_hf.errors import ConfigError, MissingFileError
from scout_hf.files import read_json, write_text
from scout_hf.kernels.triton.prefetch import BULK, LINES, OFF
from scout_hf.rules import count, fields, one_of, table

FORMAT = "scout_hf.tiles/1"


@dataclass(frozen=True)
class Tile:
    """What the decode kernel is compiled for.

    Parameters
    ----------
    tokens : int
        Tokens per pass of its loop, a power of two from 16 up.
    warps, stages : int
        Warps of a program; loop passes whose reads are in flight at once (``num_stages``).
    prefetch : int
        ``OFF``, ``LINES`` or ``BULK`` of :mod:`scout_hf.kernels.triton.prefetch`.
    ahead : int
        Passes between a prefetch and the read.
    """

    tokens: int = 64
    warps: int = 4
    stages: int = 3
    prefetch: int = OFF
    ahead: int = 4


LARGEST_FILE = 1 << 20
SIZES = {
    "tokens": one_of(16, 32, 64, 128, 256),
    "warps": one_of(1, 2, 4, 8, 16),
    "stages": count(1, 8),
    "prefetch": one_of(OFF, LINES, BULK),
    "ahead": count(1, 64),
}
RULE = fields({"format": one_of(FORMAT), "tiles": table(fields(SIZES, closed=True))}, closed=True)
"""What a file of tiles must be: a tile of other sizes would end in the middle of a kernel's launch."""

# The first that fits serves where nothing was measured.
DEFAULTS = (Tile(), Tile(32, 4, 2), Tile(16, 4, 2))
PLAIN = (Tile(), Tile(32, 4, 4), Tile(128, 4, 2), Tile(128, 8, 3), Tile(64, 2, 3))
PREFETCHING = (Tile(prefetch=LINES), Tile(128, 4, 2, LINES, 3), Tile(prefetch=BULK), Tile(128, 4, 2, BULK, 3))


def tile_for(query: torch.Tensor, keys: torch.Tensor) -> Tile:
    """The best known tile for these shapes on this chip; measured by :func:`tune`."""
    return _best(query.device, query.dtype, query.shape[-1], query.shape[1] // keys.shape[1], keys.shape[-2])


@functools.lru_cache
def _best(device: torch.device, dtype: torch.dtype, dim: int, group: int, block: int) -> Tile:
    return _table().get(_key(device, dtype, dim, group, block)) or _default(device, dim, dtype)


@functools.lru_cache
def _default(device: torch.device, dim: int, dtype: torch.dtype) -> Tile:
    """The first of ``DEFAULTS`` whose in-flight keys and values fit into shared memory."""
    if device.type != "cuda":
        return DEFAULTS[0]
    # What every chip from 8.0 on has, where torch does not say.
    capacity = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 << 10)
    row = triton.next_power_of_2(dim) * dtype.itemsize
    return next((tile for tile in DEFAULTS if 2 * tile.tokens * tile.stages * row <= capacity), DEFAULTS[-1])


def candidates(device: torch.device) -> tuple[Tile, ...]:
    """The tiles that :func:`tune` tries on a device."""
    newest = torch.cuda.get_device_capability(device) >= (9, 0)
    return PLAIN + tuple(tile for tile in PREFETCHING if newest or tile.prefetch != BULK)


def tune(
    query: torch.Tensor, keys: torch.Tensor, run: Callable[[Tile], object], tiles: tuple[Tile, ...] | None = None
) -> dict[Tile, float]:
    """Measure a kernel with every tile and remember the best, in this process and for later ones.

    Parameters
    ----------
    query, keys
        The tensors that ``run`` works on; their sizes and device are what the result holds for.
    run : callable
        Runs the kernel with a tile, with the same result every time.
    tiles : tuple of Tile or None
        Those to try; None for :func:`candidates`.

    Returns
    -------
    dict
        Milliseconds by tile, the median of several runs; tiles that do not fit this chip are left out.
    """
    times: dict[Tile, float] = {}
    for tile in candidates(query.device) if tiles is None else tiles:
        try:
            times[tile] = triton.testing.do_bench(functools.partial(run, tile), warmup=10, rep=40, return_mode="median")
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            continue
    if times:
        sizes = (query.shape[-1], query.shape[1] // keys.shape[1], keys.shape[-2])
        _table()[_key(query.device, query.dtype, *sizes)] = min(times, key=times.__getitem__)
        _best.cache_clear()
        _save()
    return times


def _key(device: torch.device, dtype: torch.dtype, dim: int, group: int, block: int) -> str:
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    return f"{chip}, triton {triton.__version__}, {dtype}, head {dim}, group {group}, block {block}"


def _file() -> Path | None:
    """Where the tiles are kept; None where there is no place of the user's own."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given / "scout_hf" / "tiles.json"
    try:
        return Path.home() / ".cache" / "scout_hf" / "tiles.json"
    except RuntimeError:
        return None  # a container's user without a home and without a line in the list of users


@functools.lru_cache
def _table() -> dict[str, Tile]:
    """What was measured, in this process and before: read from the file once, then added to."""
    path = _file()
    if path is None:
        return {}
    try:
        data = read_json(path, RULE, "`scout-hf bench gpu-kernel` makes it again", LARGEST_FILE)
    except MissingFileError:
        return {}
    except ConfigError as error:
        warnings.warn(f"ignored: {error}", stacklevel=2)
        return {}
    return {key: Tile(**sizes) for key, sizes in data["tiles"].items()}


def forget() -> None:
    """Read the file again at the next question."""
    _table.cache_clear()
    _best.cache_clear()


def _save() -> None:
    target = _file()
    if target is None:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        tiles = {key: asdict(tile) for key, tile in _table().items()}
        write_text(target, json.dumps({"format": FORMAT, "tiles": tiles}, indent=1) + "\n")
    except OSError:
        pass  # a home that cannot be written to: measured again by the next process
