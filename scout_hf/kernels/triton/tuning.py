"""Compile-time sizes of the decode kernel: a small set, measured once per GPU and shape, stored in a JSON file."""

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
from scout_hf.kernels.triton.support import next_power_of_2
from scout_hf.rules import count, fields, one_of, table

FORMAT = "scout_hf.tiles/1"


@dataclass(frozen=True)
class Tile:
    """Compile-time sizes of the decode kernel.

    Parameters
    ----------
    tokens : int
        Tokens per loop iteration, a power of two from 16 up.
    warps, stages : int
        ``num_warps``; ``num_stages``, the loop iterations with loads in flight.
    prefetch : int
        ``OFF``, ``LINES`` or ``BULK`` of :mod:`scout_hf.kernels.triton.prefetch`.
    ahead : int
        Loop iterations between a prefetch and the load.
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
"""Schema of the file; a tile with other sizes would fail at the launch."""

# Without a measurement, the first that fits is used.
DEFAULTS = (Tile(), Tile(32, 4, 2), Tile(16, 4, 2))
# Exact products of float32 take no tensor cores but registers: beyond so many channels, larger tiles spill them.
MOST_WITHOUT_TENSOR_CORES = 64
PLAIN = (Tile(), Tile(32, 4, 4), Tile(128, 4, 2), Tile(128, 8, 3), Tile(64, 2, 3))
PREFETCHING = (Tile(prefetch=LINES), Tile(128, 4, 2, LINES, 3), Tile(prefetch=BULK), Tile(128, 4, 2, BULK, 3))


def tile_for(query: torch.Tensor, keys: torch.Tensor) -> Tile:
    """The best known tile for these shapes on this GPU, from :func:`tune` or the defaults.

    Examples
    --------
    >>> query = torch.randn(1, 32, 1, 128, device="cuda")  # doctest: +SKIP
    >>> keys = torch.randn(1, 8, 64, 32, 128, device="cuda")  # doctest: +SKIP
    >>> tile = tile_for(query, keys)  # doctest: +SKIP
    """
    return _best(query.device, query.dtype, query.shape[-1], query.shape[1] // keys.shape[1], keys.shape[-2])


@functools.lru_cache
def _best(device: torch.device, dtype: torch.dtype, dim: int, group: int, block: int) -> Tile:
    return _table().get(_key(device, dtype, dim, group, block)) or _default(device, dim, dtype)


@functools.lru_cache
def _default(device: torch.device, dim: int, dtype: torch.dtype) -> Tile:
    if device.type != "cuda":
        return DEFAULTS[0]
    # The minimum of GPUs from compute capability 8.0, if torch does not report it.
    capacity = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 99 << 10)
    return default_tile(capacity, dim, dtype)


def default_tile(capacity: int, dim: int, dtype: torch.dtype) -> Tile:
    """The first of ``DEFAULTS`` that spills no registers and whose loads in flight fit into shared memory.

    Parameters
    ----------
    capacity : int
        Bytes of shared memory of a block of threads.
    dim : int
    dtype : torch.dtype

    Examples
    --------
    >>> default_tile(227 << 10, 128, torch.bfloat16)
    Tile(tokens=64, warps=4, stages=3, prefetch=0, ahead=4)
    """
    if dtype == torch.float32 and dim > MOST_WITHOUT_TENSOR_CORES:
        return DEFAULTS[-1]
    row = next_power_of_2(dim) * dtype.itemsize
    return next((tile for tile in DEFAULTS if 2 * tile.tokens * tile.stages * row <= capacity), DEFAULTS[-1])


def candidates(device: torch.device) -> tuple[Tile, ...]:
    """The tiles that :func:`tune` tries on a device.

    Examples
    --------
    >>> len(candidates(torch.device("cuda"))) > 1  # doctest: +SKIP
    True
    """
    newest = torch.cuda.get_device_capability(device) >= (9, 0)
    return PLAIN + tuple(tile for tile in PREFETCHING if newest or tile.prefetch != BULK)


def times_of(
    device: torch.device, run: Callable[[Tile], object], tiles: tuple[Tile, ...] | None = None
) -> dict[Tile, float]:
    """Median milliseconds of ``run`` by tile, as :func:`tune` measures them; nothing is stored.

    Examples
    --------
    >>> times = times_of(query.device, run)  # doctest: +SKIP
    """
    times: dict[Tile, float] = {}
    for tile in candidates(device) if tiles is None else tiles:
        try:
            times[tile] = triton.testing.do_bench(functools.partial(run, tile), warmup=10, rep=40, return_mode="median")
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
            continue
    return times


def tune(
    query: torch.Tensor, keys: torch.Tensor, run: Callable[[Tile], object], tiles: tuple[Tile, ...] | None = None
) -> dict[Tile, float]:
    """Measure a kernel with every tile, and store the best for this and later processes.

    Parameters
    ----------
    query, keys
        The tensors that ``run`` uses; the result is stored for their sizes, dtype and device.
    run : callable
        Runs the kernel with a tile, as decoding runs it: over residents, which are contiguous, with ``ids``, and with
        the splits that it takes by itself.
    tiles : tuple of Tile or None
        Tiles to try; None for :func:`candidates`.

    Returns
    -------
    dict
        Median milliseconds by tile; tiles that do not fit this GPU are left out.

    Examples
    --------
    >>> query = torch.randn(1, 32, 1, 128, dtype=torch.bfloat16, device="cuda")  # doctest: +SKIP
    >>> keys, values = torch.randn(2, 1, 8, 64, 32, 128, dtype=torch.bfloat16, device="cuda")  # doctest: +SKIP
    >>> ids = torch.randperm(64, dtype=torch.int32, device="cuda").expand(1, 8, 64).contiguous()  # doctest: +SKIP
    >>> run = lambda tile: attend_blocks(query, keys, values, 128**-0.5, ids=ids, tile=tile)  # doctest: +SKIP
    >>> times = tune(query, keys, run)  # doctest: +SKIP
    >>> best = min(times, key=times.get)  # doctest: +SKIP
    """
    times = times_of(query.device, run, tiles)
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
    """Path of the file; None if the user has no cache folder."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        return given / "scout_hf" / "tiles.json"
    try:
        return Path.home() / ".cache" / "scout_hf" / "tiles.json"
    except RuntimeError:
        return None  # no HOME and no passwd entry, as in some containers


@functools.lru_cache
def _table() -> dict[str, Tile]:
    """All measured tiles: read from the file once, then extended in this process."""
    path = _file()
    if path is None:
        return {}
    try:
        data = read_json(path, RULE, "`scout-hf bench gpu` creates it again", LARGEST_FILE)
    except MissingFileError:
        return {}
    except ConfigError as error:
        warnings.warn(f"ignored: {error}", stacklevel=2)
        return {}
    return {key: Tile(**sizes) for key, sizes in data["tiles"].items()}


def forget() -> None:
    """Drop the cached tiles, so that the file is read again."""
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
        pass  # read-only home: the next process measures again
