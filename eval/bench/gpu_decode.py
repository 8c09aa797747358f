"""Whole decode steps on a GPU: stock caches beside Scout's hand-overs, over contexts and batches, with memory capped.

Models have the shape of real ones and random weights, caches hold random keys and values, and the choice of blocks
drifts as in real text (:mod:`scout_hf.eval.bench.drift`). Every timed step adds a
token to the cache and waits for the device, as ``generate`` does, and follows one that is not timed. What does not fit
into memory is a result. Arms run one after the other, each with a cache of its own.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Cache

import scout_hf
from scout_hf import CACHE
from scout_hf.diagnostics import busy_ms, variant_of
from scout_hf.eval.arms import COMPILED, GPU_DECODE, HANDED_OVER, IN_LAYER
from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench import drift, machine
from scout_hf.eval.bench.models import MODELS, SHAPE, make_model, weight_bytes
from scout_hf.eval.bench.options import GpuDecode, Tell, silent
from scout_hf.eval.bench.timing import interleave, timed
from scout_hf.eval.caches import fill, held_bytes, kv_bytes_per_token
from scout_hf.eval.records import Record
from scout_hf.eval.rules import GPU_DECODE as RULE
from scout_hf.kernels import find_kernels

CONTEXTS, BATCHES = (8192, 32768, 65536, 131072), (1, 8, 16, 32)

WARM_UPS, PROFILED, WATCHED = 8, 3, 3
# Steps over a link may take seconds.
LONG_SECONDS, FEWEST = 20.0, 3
MOST_BATCH, FILL_TOKENS = 256, 4096
SETTINGS = ("device", "layers", "steps", "budget", "block_size", "digest", "cpu_query", "gpu_kernels", "drift",
            "threads", "seed")  # fmt: skip
"""What figures in one file must have in common."""


def run(asked: GpuDecode, tell: Tell = silent) -> dict[str, Any]:
    """Measure the arms that are not in the file yet; the whole record, for JSON.

    The file in ``out`` is written after every arm. On ``cpu`` both tiers are in host memory, and arms that need CUDA
    are skipped. ValueError for an option that is not allowed.
    """
    models, contexts, batches = asked.model or tuple(MODELS), asked.context or CONTEXTS, asked.batch or BATCHES
    place, caps, arms = devices.find(asked.device), parse_caps(asked.caps), _check(asked, models, contexts)
    threads = asked.threads or min(torch.get_num_threads(), len(machine.usable_cpus()))
    settings = {name: getattr(asked, name) for name in SETTINGS} | {"threads": threads}
    options = {name: getattr(asked, name) for name in ("budget", "block_size", "cpu_query", "gpu_kernels")}
    options |= {"digest": drift.drifting(asked.digest), "threads": threads}
    options |= {"split": "cpu" if place.type == "cpu" else "auto"}
    scout_hf.ScoutConfig(**options)
    find_kernels(asked.gpu_kernels, place)
    for context in contexts:
        _correlation(options, asked.drift, context)
    file = _begin(asked.out / "gpu_decode.json" if asked.out else None, asked.fresh, settings, place)
    cells = [(part, {"model": name, "context": context, size: value, "arm": arm})
             for part, size, values in (("arms", "batch", batches), ("largest", "cap_gib", caps))
             for name in models for context in contexts for value in values for arm in arms]  # fmt: skip
    with machine.measuring(threads, tell) as company, tqdm(total=len(cells), disable=None, leave=False) as progress:
        for name in models:
            mine = [(part, cell) for part, cell in cells if cell["model"] == name]
            todo = [(part, cell) for part, cell in mine if not file.has(cell, part)]
            progress.update(len(mine) - len(todo))
            if not todo:
                continue
            tell(f"making {name} with random weights")
            make = functools.partial(_Bench, name, asked, place, options, file.held)
            bench = devices.outcome(make, place)
            for part, cell in todo:
                _, context, size, arm = cell.values()
                progress.set_postfix_str(f"{name}, {context} tokens, {size}, {arm}")
                if isinstance(bench, dict):  # the model itself does not fit
                    found = bench
                elif part == "largest":
                    found = bench.largest(arm, context, size)
                else:
                    found = _smaller_failed(file.held["arms"], cell) or bench.measure(arm, context, size)
                file.add(cell, found, part)
                progress.update()
            del bench
            devices.release(place)
        file.held["company"] = company.record()
    return file.held | {"ratios": _ratios(file.held["arms"])}


def _begin(path: Path | None, fresh: bool, settings: dict[str, Any], place: torch.device) -> Record:
    """The record to continue. Rates are measured again; only figures of one run are compared, by its time."""
    held = {"benchmark": "gpu_decode", "models": {}, "arms": [], "largest": [], "settings": settings}
    held |= {"machine": machine.describe(), "device": devices.describe(place)}
    held["cache_grows"] = "by one token per step, warm-up included"
    held["before_each_step"] = "one more step of the same arm, not timed"
    held["selection"] = (
        f"synthetic: {settings['drift']:.0%} of the chosen blocks change per step, by a random walk of scores"
    )

    def same(record: dict[str, Any]) -> dict[str, Any]:
        given = {name: record["settings"].get(name) for name in settings}
        return given | {"GPU": record["device"]["name"] or "none"}

    return Record(path, fresh, held, RULE, same, ("models", "arms", "largest", "company"))


def _smaller_failed(arms: list[dict[str, Any]], cell: dict[str, Any]) -> dict[str, str] | None:
    """The result ``oom`` without a run, if fewer rows of the same cell ran out of memory."""
    for one in arms:
        same = all(one[name] == cell[name] for name in ("model", "context", "arm"))
        if same and one["batch"] <= cell["batch"] and "oom" in one:
            return {"skipped": f"batch {one['batch']} ran out of memory"}
    return None


class _Bench:
    """One model on its device."""

    def __init__(self, name: str, asked: GpuDecode, device: torch.device, options: dict[str, Any], record):
        self.device, self.options, self.share = device, options, asked.drift
        self.steps, self.seed, self.facts = asked.steps, asked.seed, record["device"]
        self.model = make_model(MODELS[name], asked.layers, device, asked.seed)
        config = self.model.config
        record["models"][name] = {
            **{size: getattr(config, size) for size in SHAPE},
            "whole": config.num_hidden_layers == MODELS[name]["num_hidden_layers"],
            "weight_bytes": weight_bytes(self.model),
            "kv_bytes_per_token": kv_bytes_per_token(config),
        }

    def measure(self, arm: str, context: int, batch: int) -> dict[str, Any]:
        """Figures of one arm, or the reason why there are none."""
        measure = functools.partial(self._measure, arm, context, batch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            found = self._reason(arm, context, batch) or devices.outcome(measure, self.device)
        devices.release(self.device)
        # For example, that another hand-over was used than the one asked for.
        said = {devices.first_line(one.message) for one in caught}
        return found | ({"warnings": sorted(said)} if said else {})

    def largest(self, arm: str, context: int, cap_gib: float) -> dict[str, Any]:
        """The largest batch, a power of two, that decodes within ``cap_gib`` of device memory, with its figures."""
        if self.device.type != "cuda":
            return {"skipped": "memory is capped by CUDA's allocator; it takes --device cuda"}
        share = min(1.0, cap_gib * 2**30 / torch.cuda.get_device_properties(self.device).total_memory)
        torch.cuda.set_per_process_memory_fraction(share, self.device)
        try:
            return largest_power(functools.partial(self.measure, arm, context), MOST_BATCH) | {"capped": share < 1.0}
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)

    def _reason(self, arm: str, context: int, batch: int) -> dict[str, str] | None:
        """Why an arm cannot run here."""
        if self.device.type != "cuda" and arm not in ("stock", "scout join", "scout flags", IN_LAYER):
            return {"skipped": "needs CUDA: its streams or graphs"}
        if HANDED_OVER.get(arm, "join") != "join":
            if find_kernels(self.options["gpu_kernels"], self.device) is None:
                return {"skipped": "this hand-over needs Triton kernels; see gpu_kernels of ScoutConfig"}
            if len(machine.usable_cpus()) < 2:
                return {"skipped": "while the device waits, the CPU needs a core of its own: --threads 2 or more"}
        if arm in ("stock", COMPILED):
            return None
        need = context * batch * kv_bytes_per_token(self.model.config)
        why = machine.too_large(int(1.15 * need), "lower --context, --batch or --layers")
        return {"skipped": f"host memory: {why}"} if why else None

    def _measure(self, arm: str, context: int, batch: int) -> dict[str, Any]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self._decoding(arm, context, batch) as (cache, step, handle):
            seconds = _warm_up(step)
            if handle:
                handle.reset_stats()
            count = min(self.steps, max(FEWEST, int(LONG_SECONDS / seconds)))

            def after_another():
                # As in decoding: the CPU's threads are awake, and nothing else lies between.
                step()
                return step

            timing = interleave({arm: after_another}, count, self.seed)[arm]
            stats, found = handle and handle.stats(), timing.record()
            milliseconds = found["median_ms"]
            busy, held = busy_ms(step, PROFILED, self.device), held_bytes(cache, self.device)
            cuda = self.device.type == "cuda"
            found |= {
                "tokens_per_s": 1e3 * batch / milliseconds,
                "device_kv_bytes": held["device"],
                "host_kv_bytes": held["host"],
                "device_peak_bytes": torch.cuda.max_memory_allocated(self.device) if cuda else None,
                "gpu_idle_share": busy and max(0.0, 1.0 - busy["busy"] / milliseconds),
                "gpu_wait_share": busy and min(1.0, busy["waiting"] / milliseconds),
                **self._limit(cache, held),
            }
            if stats:
                found |= {
                    "cpu_ratio": stats.cpu_ratio,
                    "join_wait_ms": stats.join_wait_ms,
                    "recalled_bytes_per_step": stats.recalled_bytes / stats.steps,
                    "attended_tokens": stats.attended_tokens,
                    "cosine": stats.cosine,
                    "as": variant_of(cache),
                    **self._drift(cache, context, step),
                }
        # JSON has no way to write other numbers.
        odd = [name for name, value in found.items() if isinstance(value, float) and not math.isfinite(value)]
        return found | dict.fromkeys(odd)

    @contextmanager
    def _decoding(self, arm: str, context: int, batch: int) -> Iterator[tuple[Cache, Callable, Any]]:
        """Context manager: a filled cache, a function that takes one step, and the handle (None if unpatched)."""
        drift.settings_for(_correlation(self.options, self.share, context), self.options["gpu_kernels"])
        capacity, call = context + WARM_UPS + 2 * self.steps + PROFILED, self.model
        try:
            with GPU_DECODE[arm].caches(self.model, capacity, **self.options) as caches:
                cache = caches.new()
                if GPU_DECODE[arm].compiled:
                    call = torch.compile(self.model, mode="reduce-overhead", dynamic=False)
                fill(cache, self.model.config, context, batch, self.seed, self.device, FILL_TOKENS)
                ids = torch.ones((batch, 1), dtype=torch.long, device=self.device)

                @torch.no_grad()
                def step():
                    call(input_ids=ids, **{CACHE: cache}, use_cache=True)
                    devices.wait(self.device)

                yield cache, step, caches.handle
        finally:
            if GPU_DECODE[arm].compiled:
                torch.compiler.reset()

    def _drift(self, cache: Cache, context: int, step: Callable) -> dict[str, float | None]:
        """The measured share of blocks that changes per step, and the cost of the random walk."""
        selectors = [layer.method.selector for layer in cache.scout_layers]
        walks = [one.digest for one in selectors]
        chosen, blocks = _chosen(self.options, context)
        if chosen >= blocks:
            return {"drift_measured": None, "drift_ms": None}
        measured = drift.watched_change(walks, chosen, blocks, step, WATCHED)
        like = torch.zeros((*selectors[0].table.codes().shape[:2], blocks), device=self.device)

        def walk():
            for one in walks:
                like.add_(one.advance(like))
            devices.wait(self.device)

        walk()
        cost = interleave({"walk": lambda: walk}, 5)["walk"]
        return {"drift_measured": measured, "drift_ms": 1e3 * cost.median}

    def _limit(self, cache: Cache, held: dict[str, int]) -> dict[str, float | None]:
        """Bytes that a step must read, and the time that this takes at the measured rates."""
        weights, copy, link = weight_bytes(self.model), self.facts["copy"], self.facts["link"]
        over_link = held["host"] if getattr(cache, "offloading", False) else 0
        moved = weights + held["device"] + held["digests"]
        limit = None
        if copy and link:
            limit = max(moved / copy["gb_per_s"], over_link / link["gb_per_s"]) / 1e6
        return {"least_device_bytes": moved, "least_link_bytes": over_link, "limit_ms": limit}


# -- parts that stand for themselves --------------------------------------------------------------------------------


def _warm_up(step: Callable[[], Any]) -> float:
    """Run warm-up steps, fewer if they are slow; seconds of the fastest. The first ones compile and capture."""
    taken = []
    while len(taken) < WARM_UPS and (len(taken) < FEWEST or sum(taken) < LONG_SECONDS / 2):
        taken.append(timed(step))
    return min(taken)


def largest_power(measure: Callable[[int], dict[str, Any]], most: int) -> dict[str, Any]:
    """The largest power of two, up to ``most``, that works, by bisection, with its result.

    What has a time works. ``stopped_by`` is the result of the next power; None if ``most`` was reached.
    """
    low, high = -1, most.bit_length()  # fits, does not fit
    best, stopped = None, None
    while high - low > 1:
        middle = (low + high) // 2
        found = measure(1 << middle)
        if "median_ms" in found:
            low, best = middle, found
        else:
            high, stopped = middle, found
    return {"largest_batch": 0 if best is None else 1 << low, "at_largest": best, "stopped_by": stopped}


def parse_caps(text: str) -> list[float]:
    """The option ``--caps``, in GiB; ValueError if a part is no number above 0.

    >>> parse_caps("24,40")
    [24.0, 40.0]
    """
    try:
        caps = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        caps = [0.0]
    if any(not 0 < cap < float("inf") for cap in caps):
        raise ValueError(f"--caps {text}: allowed are numbers of GiB above 0 with commas between; try 24,40,80")
    return caps


def _chosen(options: dict[str, Any], context: int) -> tuple[int, int]:
    """Number of chosen blocks, and of those to choose from."""
    config = scout_hf.ScoutConfig(**options)
    recent = config.blocks(config.window)
    return max(1, config.blocks(config.budget) - recent), context // config.block_size - recent


def _correlation(options: dict[str, Any], share: float, context: int) -> float:
    chosen, blocks = _chosen(options, context)
    return 1.0 if chosen >= blocks or not share else drift.correlation_for(share, chosen / blocks)


def _ratios(arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stock times divided by those of scout, within one run."""
    rows = []
    for ours in arms:
        if "median_ms" not in ours or ours["arm"].startswith("stock"):
            continue
        same = {name: ours[name] for name in ("model", "context", "batch", "run")}
        beside = [one for one in arms if same.items() <= one.items() and one["arm"].startswith("stock")]
        found = {one["arm"]: one["median_ms"] / ours["median_ms"] for one in beside if "median_ms" in one}
        rows.append(same | {"arm": ours["arm"], "times_faster_than": found})
    return rows


def _check(asked: GpuDecode, models: Sequence[str], contexts: Sequence[int]) -> tuple[str, ...]:
    """The arms to run."""
    arms, block_size = asked.arm, asked.block_size
    if unknown := [name for name in models if name not in MODELS]:
        raise ValueError(f"--model {unknown[0]}: allowed are {', '.join(MODELS)}; try llama-3-8b")
    if unknown := [name for name in arms or () if name not in GPU_DECODE]:
        raise ValueError(f"--arm {unknown[0]!r}: allowed are {', '.join(map(repr, GPU_DECODE))}; try 'scout join'")
    if asked.digest == "auto":
        raise ValueError(
            "--digest auto: name the one whose scores are to be computed, such as minmax or sign; try minmax"
        )
    scout_hf.ScoutConfig(block_size=block_size)
    if min(contexts) < 4 * block_size:
        raise ValueError(f"--context {min(contexts)}: take at least 4 blocks of {block_size}; try {64 * block_size}")
    return tuple(arms or (arm for arm in GPU_DECODE if asked.compiled or arm != COMPILED))
