"""Decoding within a limit of memory that is smaller than the keys and values, beside decoding with all in memory."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scout_hf import ScoutCache
from scout_hf.eval.bench import disk
from scout_hf.eval.bench.memory import Peak
from scout_hf.eval.bench.options import Sessions, Tell
from scout_hf.eval.bench.sessions_walk import Walk, Walker, files_of, must_be_equal
from scout_hf.eval.caches import kv_bytes_per_token

MEMORY, LIMIT, LOADED, COLD = "memory", "limit", "session, limit", "session, limit, cold"


def measure(walker: Walker, folder: Path, options: Sessions, tell: Tell) -> dict[str, Any]:
    """Steps of all arms, and what the memory of the limited ones held at most.

    A cold arm finds nothing in the page cache before each step but what its own memory holds.
    """
    kv = options.limited * kv_bytes_per_token(walker.model.config)
    limit, path, spill = int(options.share * kv), folder / "long.kv", folder / "spill"
    tell(f"{options.limited} tokens, {kv / 2**20:.0f} MiB of KV, with {limit / 2**20:.0f} MiB of memory")
    spill.mkdir()
    settings = {"host_memory": limit, "spill_dir": str(spill)}
    held = walker.filled(options.limited)
    held.save(path, walker.model)
    warm_up = walker.ids(options.steps)
    arms: dict[str, ScoutCache] = {MEMORY: held}
    memory, done = {}, {MEMORY: walker.walk(held.fork(), warm_up)}

    def add(name: str, make: Callable[[], ScoutCache], files: Path) -> None:
        _tidy()
        with Peak() as peak:
            arms[name] = make()
            os.sync()  # a long prompt takes minutes, in which the system writes what is new
            most = 0

            def look() -> None:
                nonlocal most
                most = max(most, disk.mapped_bytes(files))

            done[name] = walker.walk(arms[name].fork(), warm_up, before=look)
            look()
            _tidy()
            grown = peak.grown()
        digests = arms[name].tier_bytes()["digests"]
        memory[name] = {
            "grown_bytes": grown,
            "peak_bytes": peak.bytes,
            "digest_bytes": digests,
            "page_bytes": most,
            "over_limit": max(most, grown - digests) / limit,
        }

    add(LIMIT, lambda: walker.filled(options.limited, **settings), spill)
    add(LOADED, lambda: ScoutCache.load(path, walker.model, **settings), path)
    arms[COLD] = ScoutCache.load(path, walker.model, **settings)
    must_be_equal(done)
    tell(f"{options.repeat} rounds of {options.steps} steps of {', '.join(arms)}")
    walks, wanted = {name: Walk() for name in arms}, dict.fromkeys(arms, 0)
    files = files_of(path)
    for _ in range(options.repeat):
        ids, done = walker.ids(options.steps), {}
        for name in walker.shuffled(arms):
            limits = arms[name].scout_layers[0].memory
            before = limits.wanted_bytes if limits else 0
            disk.read(files)
            cold = {"before": lambda: disk.drop(files)} if name == COLD else {}
            done[name] = walker.walk(arms[name].fork(), ids, **cold)
            wanted[name] += limits.wanted_bytes - before if limits else 0
            walks[name].add(done[name])
            gc.collect()
        must_be_equal(done)
    steps = options.repeat * options.steps
    found = {name: walk.record() | {"away_bytes": wanted[name] / steps} for name, walk in walks.items()}
    return {
        "tokens": options.limited,
        "kv_bytes": kv,
        "limit_bytes": limit,
        "memory": memory,
        "steps": found,
        "ratios": {f"{MEMORY}/{name}": found[MEMORY]["median_ms"] / found[name]["median_ms"] for name in arms},
    }


def _tidy() -> None:
    """Give freed memory back to the system, such as that of drawing random keys."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
