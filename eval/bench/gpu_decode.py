"""Whole decode steps for ``bench gpu``: one cache of two tiers on which arms are switched, and full attention.

The model has the shape of a real one and random weights, caches hold random keys and values, and the choice of blocks
drifts as in real text (:mod:`scout_hf.eval.bench.drift`). Steps of growing caches add a token each and wait for the
device, as ``generate`` does; every timed step follows one that is not timed. A batch that memory does not hold is
halved.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from transformers import Cache

import scout_hf
from scout_hf import CACHE
from scout_hf.diagnostics import variant_of
from scout_hf.errors import HostMemoryError, PinnedMemoryError
from scout_hf.eval import arms
from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench import drift
from scout_hf.eval.bench.gpu_cache import fill_two_tiers, switched
from scout_hf.eval.bench.gpu_full import ATTENTIONS, KERNEL, attending, full_cache, full_step
from scout_hf.eval.bench.gpu_machine import NO_GPU, memory_limit_gib
from scout_hf.eval.bench.gpu_stages import Given, Job, first_line, why_none
from scout_hf.eval.bench.models import MODELS, make_model
from scout_hf.eval.bench.timing import interleave, timed
from scout_hf.eval.caches import fill, held_bytes, kv_bytes_per_token, random_kv
from scout_hf.selection import digest_for

SHORT, LONG, WIDE, OFFLOADED = (8, 8192), (8, 65536), (16, 32768), (8, 32768)
REHEARSED = 1 / 16
"""Of the tokens, without a GPU."""
TINY = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1 << 20,
    "tie_word_embeddings": False,
}  # fmt: skip
BLOCK_SIZE = 32
STEPS, FEWEST, MOST_SECONDS = 24, 2, 6.0
WARM_UPS, WARM_SECONDS, COMPILING = 8, 3.0, 6
"""Steps that are not timed: at most, for so long, and at least where they compile and capture."""
HOST_SHARE, SPARE_SHARE = 0.9, 9 / 8
"""Of the machine's memory for KV; slabs beside the pages in use."""
MODEL, KV, FULL, STOCK_ARM = "model", "cache", "full KV, {}", "stock"


def short(given: Given) -> list[Job]:
    """A short context, which shows what a step costs beside attention."""
    return Bench(given, *SHORT).jobs()


def long(given: Given) -> list[Job]:
    """A long one."""
    return Bench(given, *LONG).jobs()


def wide(given: Given) -> list[Job]:
    """More rows with as much KV."""
    return Bench(given, *WIDE).jobs()


def offloaded(given: Given) -> list[Job]:
    """What transformers has for KV that does not fit: all of it crosses in every step."""
    bench = Bench(given, *OFFLOADED)
    arm = arms.STOCK["stock offloaded"]
    return [bench.model_job(), Job(arm.name, functools.partial(bench.stock, arm), 80, (MODEL,))]


class Bench:
    """One model, and the shape of its caches; ``rows`` are halved where memory is short."""

    def __init__(self, given: Given, rows: int, tokens: int):
        self.given, self.settings = given, given.settings
        self.device = devices.find(given.settings["device"])
        self.on_gpu = self.device.type == "cuda"
        self.rows, self.tokens = rows, tokens if self.on_gpu else int(tokens * REHEARSED)
        # With two tiers and a tiny context the budget would be all of it.
        budget = self.settings["budget"] if self.on_gpu else int(self.settings["budget"] * REHEARSED)
        self.options = {"budget": budget, "block_size": BLOCK_SIZE, "split": "auto" if self.on_gpu else "cpu"}
        scout_hf.ScoutConfig(**self.options, digest=self.settings["digest"])
        self.model: Any = None
        self.base: Any = None

    def jobs(self) -> list[Job]:
        """The model, the cache, then the arms: those that matter most first."""
        ours = [Job(name, functools.partial(self.scout, arm), 75, (MODEL, KV)) for name, arm in arms.GPU.items()]
        full = [Job(FULL.format(way), functools.partial(self.full, way), 60, (MODEL,)) for way in ATTENTIONS]
        stock = Job(STOCK_ARM, functools.partial(self.stock, arms.STOCK["stock"]), 60, (MODEL,))
        cache = Job(KV, self.make_cache, 120, (MODEL,), again=True)
        return [self.model_job(), cache, *ours[:2], *full, stock, *ours[2:]]

    def model_job(self) -> Job:
        return Job(MODEL, self.make_model, 60, again=True)

    # -- what arms share ------------------------------------------------------------------------------------------

    def make_model(self) -> dict[str, Any]:
        """Make the model."""
        shape = MODELS["llama-3-8b"] if self.on_gpu else TINY
        self.model = make_model(shape, self.settings["layers"], self.device, self.settings["seed"])
        self.options["digest"] = drift.drifting(self._digest())
        layers = self.model.config.num_hidden_layers
        cut = "" if layers == shape["num_hidden_layers"] else f", CUT to {layers} layers"
        return {"facts": [("llama-3-8b" if self.on_gpu else "a tiny model") + cut], "layers": layers}

    def make_cache(self) -> dict[str, Any]:
        """Make and fill the cache that all arms of two tiers fork."""
        rows, why = self.rows >> self.given.tries.get(KV, 0), ""
        if rows < self.rows:
            why = "its process was ended while it was filled"
        while rows:
            need = self._kv_bytes(rows) * SPARE_SHARE
            free = HOST_SHARE * (memory_limit_gib() or psutil.virtual_memory().total / 2**30) * 2**30
            if need > free:
                why = f"{need / 2**30:.0f} GiB of host memory are needed, and {free / 2**30:.0f} may be used"
            else:
                try:
                    self._fill(rows)
                except (HostMemoryError, PinnedMemoryError, torch.OutOfMemoryError, MemoryError) as error:
                    why = first_line(error)
                else:
                    break
                # Outside of the handler, whose error holds what was made.
                self.base = None
                devices.release(self.device)
            rows //= 2
        if not rows:
            raise MemoryError(why)
        note = {"note": f"batch {rows} instead of {self.rows}: {why}"} if rows < self.rows else {}
        self.rows = rows
        held = held_bytes(self.base, self.device)
        return note | self._where() | {"host_kv_bytes": held["host"], "facts": [f"{self._digest()} digest"]}

    def _digest(self) -> str:
        keys = random_kv(self.model.config, 1)[0].to(self.device)
        return digest_for(scout_hf.ScoutConfig(digest=self.settings["digest"]), keys)

    def _fill(self, rows: int) -> None:
        with self._patched({}) as handle:
            cache = handle.new_cache()
            fill_two_tiers(cache, self.model, self.tokens, rows, self.settings["seed"])
            self.base = cache

    # -- the arms -------------------------------------------------------------------------------------------------

    def scout(self, arm: arms.Arm) -> dict[str, Any]:
        """Figures of an arm of two tiers."""
        way = arm.options["hand_over"]
        if not self.on_gpu and way != "join":
            return dict(NO_GPU)
        if why := why_none(self.given.known.get("smoke", {}).get(way, {"skipped": "was not run"})):
            return {"skipped": f"not run: smoke of {way} failed ({why})"}
        options = arm.options if self.on_gpu else {"cpu_query": arm.options["cpu_query"]}
        with _told() as said, self._patched(options) as handle, _counted(self.device) as found:
            cache = switched(self.base, **options)
            found |= self._time(self._step(cache), COMPILING, handle.reset_stats)
            stats = handle.stats()
            found |= self._held(cache) | {
                "cpu_ratio": stats.cpu_ratio,
                "join_wait_ms": stats.join_wait_ms,
                "attended_tokens": stats.attended_tokens,
                "recalled_bytes_per_step": stats.recalled_bytes / max(1, stats.steps),
                "facts": [variant_of(cache)],
            }
        return self._where() | found | ({"warnings": said} if said else {})

    def stock(self, arm: arms.Arm) -> dict[str, Any]:
        """Figures of a cache of transformers."""
        if too_large := None if arm.cache == "offloaded" else self._too_large():
            return too_large
        with arm.caches(self.model) as caches, _counted(self.device) as found:
            cache = caches.new()
            fill(cache, self.model.config, self.tokens, self.rows, self.settings["seed"], self.device)
            found |= self._time(self._step(cache), 1)
            found |= self._held(cache)
        return self._where() | found

    def full(self, way: str) -> dict[str, Any]:
        """Figures of full attention with a fast kernel, in a graph if that can be."""
        if not self.on_gpu and way == KERNEL:
            return dict(NO_GPU)
        if too_large := self._too_large():
            return too_large
        with attending(self.model, way), _counted(self.device) as found:
            cache = full_cache(self.model, self.tokens, self.rows, self.settings["seed"])
            step, why = full_step(self.model, cache, self.rows)
            found |= self._time(lambda: (step(), devices.wait(self.device)), 1)
            found |= self._held(cache) | ({"note": why} if why else {})
        return self._where() | found

    # -- parts ----------------------------------------------------------------------------------------------------

    @contextmanager
    def _patched(self, options: dict[str, Any]) -> Iterator[Any]:
        drift.settings_for(self._correlation(), "auto")
        with scout_hf.patch(self.model, **self.options | options) as handle:
            yield handle

    def _correlation(self) -> float:
        config = scout_hf.ScoutConfig(**self.options)
        recent = config.blocks(config.window)
        chosen, blocks = max(1, config.blocks(config.budget) - recent), self.tokens // config.block_size - recent
        share = self.settings["drift"]
        return 1.0 if chosen >= blocks or not share else drift.correlation_for(share, chosen / blocks)

    def _step(self, cache: Cache) -> Callable[[], None]:
        ids = torch.ones((self.rows, 1), dtype=torch.int64, device=self.device)

        @torch.no_grad()
        def step() -> None:
            self.model(input_ids=ids, **{CACHE: cache}, use_cache=True)
            devices.wait(self.device)

        return step

    def _time(self, step: Callable[[], Any], fewest: int, begin: Callable[[], Any] = lambda: None) -> dict[str, Any]:
        taken = []
        while len(taken) < max(WARM_UPS, fewest) and (len(taken) < fewest or sum(taken) < WARM_SECONDS):
            taken.append(timed(step))
        begin()
        count = min(STEPS, max(FEWEST, int(MOST_SECONDS / 2 / min(taken))))

        def after_another() -> Callable[[], Any]:
            # As in decoding: the CPU's threads are awake, and nothing else lies between.
            step()
            return step

        found = interleave({"step": after_another}, count, self.settings["seed"])["step"].record()
        return found | {"tokens_per_s": 1e3 * self.rows / found["median_ms"]}

    def _where(self) -> dict[str, int]:
        return {"batch": self.rows, "context": self.tokens}

    def _kv_bytes(self, rows: int) -> int:
        return rows * self.tokens * kv_bytes_per_token(self.model.config)

    def _too_large(self) -> dict[str, str] | None:
        layer = self._kv_bytes(self.rows) // self.model.config.num_hidden_layers
        return devices.too_large(self._kv_bytes(self.rows) + 3 * layer, self.device)

    def _held(self, cache: Cache) -> dict[str, int]:
        held = held_bytes(cache, self.device)
        return {"device_kv_bytes": held["device"] + held["digests"], "host_kv_bytes": held["host"]}


@contextmanager
def _counted(device: torch.device) -> Iterator[dict[str, Any]]:
    """What an arm found, with the most device memory that was in use; what the one before held is free."""
    found: dict[str, Any] = {}
    devices.release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield found
    if device.type == "cuda":
        found["device_peak_bytes"] = torch.cuda.max_memory_allocated(device)


@contextmanager
def _told() -> Iterator[list[str]]:
    """Warnings: for example, that another hand-over was used than the one asked for."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        yield said
    said += sorted({first_line(one.message) for one in caught})
