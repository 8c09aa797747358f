"""Sessions on disk: saving and opening caches, and decoding with less memory than the keys and values take.

The model has the shape of Llama 3.2 1B and random weights. All arms decode the same random tokens by the patched model
and must give the same logits to the bit: that is the proof that each did its work. That something was cold is proven by
what disks read for this process, as the system counts it.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import scout_hf
from scout_hf import ScoutCache
from scout_hf.eval.bench import disk, machine, sessions_limit
from scout_hf.eval.bench.models import SHAPE, make_llama, weight_bytes
from scout_hf.eval.bench.options import Sessions, Tell, all_but, silent
from scout_hf.eval.bench.sessions_walk import Walk, Walker, files_of, make, must_be_equal, record_of
from scout_hf.eval.bench.timing import interleave, timed
from scout_hf.eval.caches import DTYPE, caches_of, kv_bytes_per_token

MEMORY, WARM, COLD = "memory", "warm", "cold"
AT_MOST = {"load_s": 0.3, "first_over_step": 3.0, "limit_memory": 1.2}
AT_LEAST = {"save_over_bare": 0.6, "limit_speed": 1 / 3}
NAMED = ("load_s", "first_over_step", "save_over_bare", "limit_speed", "limit_memory")
FEW = 3
COPIED_BYTES = 256 << 20
SPARE_BYTES = 2 << 30


def run(options: Sessions, tell: Tell = silent, shape: dict[str, int] | None = None, seed: int = 0) -> dict[str, Any]:
    """Measure everything and return it in a form that JSON takes; ``shape`` as LlamaConfig takes it."""
    scout_hf.ScoutConfig(budget=options.budget, block_size=options.block_size)
    shape = (shape or {}) | {"num_hidden_layers": options.layers}
    threads = options.threads or min(torch.get_num_threads(), len(machine.usable_cpus()))
    settings = all_but(options, "out", "folder") | {"threads": threads, "seed": seed}
    with (
        machine.measuring(threads, tell) as company,
        tempfile.TemporaryDirectory(prefix="scout_hf_bench_", dir=options.folder) as made,
    ):
        tell(f"making a model of {options.layers} layers with random weights")
        model, folder = make_llama(seed, **shape), Path(made)
        of_token, where = kv_bytes_per_token(model.config), disk.about(folder)
        most = of_token * max(options.context, options.limited)
        machine.check_memory(2 * most + SPARE_BYTES, "lower --context, --limited or --layers")
        disk.check_room(folder, 3 * most)
        with caches_of(model, budget=options.budget, block_size=options.block_size) as caches:
            walker = Walker(model, caches.handle, seed)
            opened = _opening(walker, folder, options, tell)
            limited = sessions_limit.measure(walker, folder, options, tell) if options.limited else None
    record = {
        "benchmark": "sessions",
        "settings": settings,
        "model": {
            **{name: getattr(model.config, name) for name in SHAPE},
            "dtype": str(DTYPE).removeprefix("torch."),
            "weight_bytes": weight_bytes(model),
            "kv_bytes_per_token": of_token,
        },
        "machine": machine.describe(),
        "company": company.record(),
        "disk": where,
        "cold": "dropped from the page cache of this system; the disk may have caches of its own",
        **opened,
        "limited": limited,
    }
    return record | {"targets": targets(record)}


def targets(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What must hold, what was found, and whether it holds."""
    steps, limited = record["steps"], record["limited"]
    found = {
        "load_s": record["load"][WARM]["median_ms"] / 1e3,
        "first_over_step": steps[WARM]["first"]["median_ms"] / steps[MEMORY]["later"]["median_ms"],
        "save_over_bare": record["save"]["ratios"]["bare/save"],
    }
    if limited:
        found["limit_speed"] = limited["ratios"]["memory/limit"]
        found["limit_memory"] = limited["memory"]["limit"]["over_limit"]
    most, least = AT_MOST, AT_LEAST
    rows = []
    for name, value in found.items():
        held = value <= most[name] if name in most else value >= least[name]
        bound = (most | least)[name]
        rows.append({"name": name, "bound": bound, "at_most": name in most, "found": value, "held": held})
    return rows


def _opening(walker: Walker, folder: Path, options: Sessions, tell: Tell) -> dict[str, Any]:
    """A cache that is saved and opened, its first and later steps, a question; all beside bare calls."""
    tell(f"context {options.context}: filling a cache, saving it {1 + options.repeat} times")
    held, path = walker.filled(options.context), folder / "session.kv"
    saved = _saving(walker, held, path, options.repeat)
    tell(f"context {options.context}: opening it, {options.repeat} rounds of {options.steps} steps")
    files = files_of(path)
    small = [file for file in files if file.name != "pages.safetensors"]
    size = sum(file.stat().st_size for file in small)
    loads: dict[str, list[float]] = {name: [] for name in (WARM, COLD, "bare warm", "bare cold")}
    walks = {name: {"first": Walk(), "later": Walk()} for name in (MEMORY, WARM, COLD)}

    def opened(kind: str) -> ScoutCache:
        if kind == MEMORY:
            return held.fork()
        make(kind == COLD, files)
        caches: list[ScoutCache] = []
        loads[kind].append(timed(lambda: caches.append(ScoutCache.load(path, walker.model))))
        return caches[0]

    def bare(kind: str) -> None:
        make(kind == "bare cold", files)
        loads[kind].append(timed(lambda: disk.read(small)))

    for turn in range(1 + options.repeat):
        ids, done = walker.ids(options.steps), {}
        for name in walker.shuffled([*walks, "bare warm", "bare cold"]):
            if name in walks:
                done[name] = walker.walk(opened(name), ids)
            else:
                bare(name)
            gc.collect()
        must_be_equal(done)
        if not turn:  # what is set up once
            for times in loads.values():
                times.clear()
            continue
        for name, walk in done.items():
            walks[name]["first"].add(walk.part(0, 1))
            walks[name]["later"].add(walk.part(1))
    question = None
    if options.question:
        tell(f"a question of {options.question} tokens, which reads all pages")
        question = _question(walker, held, path, options.question)
    return {
        "save": saved,
        "load": {"bytes": size, **{name: record_of(times, size) for name, times in loads.items()}},
        "steps": {name: {part: walk.record() for part, walk in parts.items()} for name, parts in walks.items()},
        "question": question,
        "read": _bare_reads(walker, files, options),
    }


def _saving(walker: Walker, held: ScoutCache, path: Path, repeat: int) -> dict[str, Any]:
    """Saving, beside a bare write of as many bytes; both up to the disk."""
    held.save(path, walker.model)
    files = {file.name: file.stat().st_size for file in files_of(path)}
    size, other, filler = sum(files.values()), path.with_name("bare"), os.urandom(disk.CHUNK_BYTES)

    def save() -> Callable[[], None]:
        shutil.rmtree(path)
        return lambda: held.save(path, walker.model)

    def bare() -> Callable[[], None]:
        other.unlink(missing_ok=True)
        return lambda: disk.write(other, size, filler)

    bare()()
    times = interleave({"save": save, "bare": bare}, repeat, walker.seed)
    other.unlink()
    ratios = {"bare/save": times["bare"].median / times["save"].median}
    return {"bytes": size, "files": files, **{name: one.record(size) for name, one in times.items()}, "ratios": ratios}


def _question(walker: Walker, held: ScoutCache, path: Path, tokens: int) -> dict[str, Any]:
    walks = {MEMORY: Walk(), WARM: Walk()}
    for _ in range(FEW):
        ids, done = walker.ids(tokens), {}
        for name in walker.shuffled(walks):
            cache = held.fork() if name == MEMORY else ScoutCache.load(path, walker.model)
            done[name] = walker.walk(cache, ids, at_once=tokens)
            walks[name].add(done[name])
        must_be_equal(done)
    times = {name: walk.record() for name, walk in walks.items()}
    return {"tokens": tokens, **times, "ratios": {"warm/memory": times[WARM]["median_ms"] / times[MEMORY]["median_ms"]}}


def _bare_reads(walker: Walker, files: list[Path], options: Sessions) -> dict[str, Any]:
    """The file of pages by plain calls: in order, and as many scattered pieces as one step attends."""
    config, pages = walker.model.config, max(files, key=lambda file: file.stat().st_size)
    piece = 2 * config.head_dim * options.block_size * DTYPE.itemsize
    blocks = max(1, min(options.budget, options.context) // options.block_size)
    count, size = blocks * config.num_hidden_layers * config.num_key_value_heads, pages.stat().st_size
    calls = {
        "warm in order": (False, size, lambda: disk.read([pages])),
        "cold in order": (True, size, lambda: disk.read([pages])),
        "warm scattered": (False, piece * count, lambda: disk.read_scattered(pages, piece, count, False)),
        "cold one by one": (True, piece * count, lambda: disk.read_scattered(pages, piece, count, False)),
        "cold announced": (True, piece * count, lambda: disk.read_scattered(pages, piece, count, True)),
    }
    found: dict[str, Any] = {"piece_bytes": piece, "pieces": count}
    for name, (cold, read, call) in calls.items():
        times, before = [], disk.read_bytes()
        for _ in range(FEW):
            make(cold, files)
            before = disk.read_bytes()
            times.append(timed(call))
        found[name] = record_of(times, read) | {"disk_bytes": disk.read_bytes() - before}
    memory = np.ones(COPIED_BYTES, dtype=np.uint8)
    other = memory.copy()
    copies = [timed(lambda: np.copyto(other, memory)) for _ in range(FEW)]
    return found | {"memcpy": record_of(copies, COPIED_BYTES)}
