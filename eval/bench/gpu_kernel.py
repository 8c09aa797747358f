"""The Triton decode kernel, with and without prefetch into L2, beside torch, FlashInfer and FlashAttention.

The shapes are those of the paper on prefetching (arXiv 2504.06319). All read the same keys and values, and read them
from memory: where these would fit into the device's last cache level, several copies take turns. Calls are captured in
CUDA graphs, so that what the CPU takes to launch them does not count.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from scout_hf import ScoutConfig
from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench import machine
from scout_hf.eval.bench.cpu_kernel import random_lists
from scout_hf.eval.bench.gpu_rivals import by_gathering, made, with_flash, with_flash_attn, with_flashinfer, with_sdpa
from scout_hf.eval.bench.options import GpuKernel, Tell, all_but, check_sizes, silent
from scout_hf.eval.bench.timing import Timing, timed
from scout_hf.eval.caches import DTYPE, tensor_bytes
from scout_hf.kernels import find_kernels
from scout_hf.selection import Selector, mean_share

WHOLE = {
    "heads": ((32, 32), (32, 8), (40, 8), (28, 4)),
    "batches": (1, 4, 16, 64, 128),
    "contexts": (512, 2048, 8192, 32768),
    "block_sizes": (32, 16),
    "score_tokens": (65536, 131072),
    "repeat": 10,
}
QUICK = {
    "heads": WHOLE["heads"][:2],
    "batches": (16,),
    "contexts": (2048, 8192),
    "block_sizes": (32,),
    "score_tokens": WHOLE["score_tokens"][:1],
    "repeat": 5,
}
DIGESTS = ("minmax", "minmax-int8", "sign", "sign2")
PLAIN, LINES, BULK = "plain", "prefetch lines", "prefetch bulk"
SDPA, FLASH, FLASHINFER, FLASH_ATTN = "sdpa", "sdpa flash", "flashinfer", "flash_attn"
GATHERED = "gathered by torch"
RIVALS = {SDPA: with_sdpa, FLASH: with_flash, FLASHINFER: with_flashinfer, FLASH_ATTN: with_flash_attn}
FILL_TOKENS = 8192


def run(options: GpuKernel, tell: Tell = silent) -> dict[str, Any]:
    """Measure the decode kernel and block scoring; the record, for JSON.

    On ``cpu`` the kernels run in Triton's interpreter (``TRITON_INTERPRET=1``): this shows that the benchmark runs, and
    its times mean nothing. The best tile for each head size, GQA group and block size is saved for later decoding.
    ValueError for an option that is not allowed.
    """
    given = {"batches": options.batch, "contexts": options.context, "block_sizes": options.block_size}
    given |= {"heads": [parse_heads(one) for one in options.heads or ()]}
    given |= {"score_tokens": options.score_tokens, "repeat": options.repeat}
    grid = WHOLE | (QUICK if options.quick else {}) | {name: value for name, value in given.items() if value}
    heads, batches, contexts, block_sizes, score_tokens, repeat = (grid[name] for name in WHOLE)
    head_dim, selected, cache_tokens = options.head_dim, options.selected, options.cache_tokens
    settings = all_but(options, "batch", "context", "block_size", "quick", "out") | grid
    place = devices.find(options.device)
    for size in block_sizes:
        ScoutConfig(block_size=size)
        check_sizes(heads, size, (*contexts, selected, cache_tokens, *score_tokens))
    if head_dim % 8 or not 8 <= head_dim <= 256:
        raise ValueError(f"--head-dim {head_dim}: allowed are multiples of 8 from 8 to 256; try 128")
    if selected > cache_tokens:
        raise ValueError(f"--selected {selected}: the cache has {cache_tokens} tokens; select less")
    kernels = find_kernels("triton", place)
    threads = len(machine.usable_cpus())
    group = next((pair for pair in heads if pair[0] > pair[1]), heads[0])
    cells = [("dense", *pair, size, batch, tokens)
             for pair in heads for size in block_sizes for batch in batches for tokens in contexts]  # fmt: skip
    cells += [("scattered", *pair, size, options.selected_batch, selected, cache_tokens)
              for pair in heads for size in block_sizes]  # fmt: skip
    cells += [("score", *group, block_sizes[0], tokens, name, options.score_batch, selected)
              for tokens in score_tokens for name in DIGESTS]  # fmt: skip
    found: dict[str, list] = {"dense": [], "scattered": [], "score": []}
    with machine.measuring(threads, tell) as company:
        facts = devices.describe(place)
        bench = _Bench(place, kernels, head_dim, repeat, options.seed, facts["copy"] and facts["copy"]["gb_per_s"])
        for kind, *cell in tqdm(cells, desc="gpu-kernel", leave=False, disable=None):
            found[kind].append(bench.guarded(getattr(bench, kind), *cell))
    return {
        "benchmark": "gpu_kernel",
        "settings": settings | {"threads": threads},
        "machine": machine.describe(),
        "device": facts,
        "company": company.record(),
        "dtype": str(DTYPE).removeprefix("torch."),
        **found,
    }


class _Bench:
    """Settings shared by all cells; ``rate`` is the measured rate of copies on the device, in GB/s, or None."""

    def __init__(self, device, kernels, dim: int, repeat: int, seed: int, rate: float | None):
        self.device, self.kernels, self.dim = device, kernels, dim
        self.repeat, self.seed, self.rate = repeat, seed, rate
        self.random = torch.Generator(device).manual_seed(seed)

    def guarded(self, measure, *cell) -> dict[str, Any]:
        """The result of a cell; an error or lack of memory is a result too."""
        where, need, call = measure(*cell)
        found = devices.too_large(need, self.device) or devices.outcome(call, self.device)
        devices.release(self.device)
        return where | found

    # -- the cells: what they are, the memory that they need, and what measures them ------------------------------

    def dense(self, heads: int, kv_heads: int, size: int, batch: int, tokens: int):
        """Attention to the whole of a contiguous context."""
        kv = 2 * batch * kv_heads * tokens * self.dim * DTYPE.itemsize
        turns = devices.copies(kv, self.device)
        where = self._where(heads, kv_heads, size, batch, tokens) | {"kv_bytes": kv, "copies": turns}

        def measure():
            query = self._normal(batch, heads, 1, self.dim)
            keys, values = (self._normal(turns, batch, kv_heads, tokens, self.dim) for _ in range(2))
            sets = list(zip(keys, values))

            def attend(part, tile):
                blocks = (each.unflatten(2, (-1, size)) for each in part)
                return self._attend(query, *blocks, tile=tile)

            calls = self._tiles(query, keys[0].unflatten(2, (-1, size)), sets, attend)
            others = {name: functools.partial(make, query, sets) for name, make in RIVALS.items()}
            return self._compare(calls, others, kv)

        return where, turns * kv, measure

    def scattered(self, heads: int, kv_heads: int, size: int, batch: int, selected: int, tokens: int):
        """Attention to blocks scattered over a pool of pages; each KV head has other blocks."""
        blocks, count = tokens // size, selected // size
        kv = 2 * batch * kv_heads * selected * self.dim * DTYPE.itemsize
        turns = max(2, devices.copies(kv, self.device))
        where = self._where(heads, kv_heads, size, batch, selected) | {"kv_bytes": kv, "cache_tokens": tokens}

        def measure():
            query = self._normal(batch, heads, 1, self.dim)
            keys, values = (self._normal(batch * blocks, kv_heads, size, self.dim) for _ in range(2))
            first = (torch.arange(batch) * blocks).view(-1, 1, 1)
            drawn = torch.Generator().manual_seed(self.seed)
            sets = []
            for _ in range(turns):
                ids = random_lists(batch * kv_heads, blocks, count, drawn).ids.view(batch, kv_heads, count)
                sets.append((ids.to(self.device), (ids + first).to(self.device, torch.int32)))

            def attend(part, tile):
                return self._attend(query, keys, values, ids=part[0], pages=part[1], tile=tile)

            calls = self._tiles(query, keys, sets, attend)
            return self._compare(calls, {GATHERED: functools.partial(by_gathering, query, keys, values, sets)}, kv)

        return where, kv * tokens // selected, measure

    def score(self, heads: int, kv_heads: int, size: int, tokens: int, name: str, batch: int, selected: int):
        """Scores of all digests of a context, and the choice of the top-k blocks."""
        blocks = tokens // size
        count = max(1, min(blocks, selected // size))
        where = {"digest": name, "query_heads": heads, "kv_heads": kv_heads, "block_size": size, "batch": batch}
        where |= {"tokens": tokens, "blocks": blocks, "chosen": count}

        def measure():
            codes, digest = self._codes(name, batch, kv_heads, size, tokens)
            bytes_read = tensor_bytes(codes)
            turns = devices.copies(bytes_read, self.device)
            tables = [codes, *(codes.clone() for _ in range(turns - 1))]
            query = self._normal(batch, heads, 1, self.dim)
            slots = torch.where(torch.rand((batch, kv_heads, blocks), device=self.device, generator=self.random) < 0.5,
                                0, -1).to(torch.int32)  # fmt: skip

            def score(table):
                return ranked(self.kernels.score(digest.native, digest.prepare(query), table, block_size=size))

            def ranked(scores):
                return mean_share(scores, kv_heads, None) if digest.per_head and scores is not None else scores

            scores = score(codes)
            if scores is None:
                return {"skipped": f"no kernel scores {name} codes of heads of {self.dim} and blocks of {size}"}
            by_torch = ranked(digest.score(query, codes))
            out = self.kernels.choose(scores, count, 1, None, slots, count)

            def choose(of):
                return self.kernels.choose(of, count, 1, None, slots, count, out=out)

            calls = {
                "score": [functools.partial(score, table) for table in tables],
                "choose": [functools.partial(choose, scores)],
                "score and choose": [lambda table=table: choose(score(table)) for table in tables],
            }
            apart = (scores - by_torch).abs().max() / by_torch.abs().max()
            found = {"digest_bytes": bytes_read, "copies": turns, "difference": float(apart)}
            return found | {"times": self._times(calls, {"score": bytes_read, "score and choose": bytes_read})[1]}

        # An eighth of that for codes, which grow and take turns, and a part of the keys.
        return where, batch * kv_heads * tokens * self.dim, measure

    # -- parts ---------------------------------------------------------------------------------------------------

    def _where(self, heads, kv_heads, size, batch, tokens) -> dict[str, int]:
        return {"query_heads": heads, "kv_heads": kv_heads, "block_size": size, "batch": batch, "tokens": tokens}

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=DTYPE, device=self.device).normal_(generator=self.random)

    def _attend(self, query, keys, values, **given) -> torch.Tensor:
        parts = self.kernels.attend_blocks(query, keys, values, self.dim**-0.5, **given)
        return self.kernels.merge(*parts, dtype=query.dtype)[0]

    def _tiles(self, query, keys, sets, attend) -> dict[str, tuple[list[Callable], Any]]:
        """Calls with the best tile of each kind of prefetch."""
        from scout_hf.kernels.triton import prefetch, tuning

        kinds = {PLAIN: prefetch.OFF, LINES: prefetch.LINES, BULK: prefetch.BULK}
        if self.device.type == "cuda":
            times = tuning.tune(query, keys, functools.partial(attend, sets[0]))
        else:
            # What times tiles needs a GPU: here one of each kind serves.
            every = tuning.PLAIN + tuning.PREFETCHING
            some = [next(tile for tile in every if tile.prefetch == kind) for kind in kinds.values()]
            times = {tile: timed(functools.partial(attend, sets[0], tile)) for tile in some}
        calls = {}
        for name, kind in kinds.items():
            best = min((tile for tile in times if tile.prefetch == kind), key=times.__getitem__, default=None)
            if best is not None:
                calls[name] = [functools.partial(attend, part, best) for part in sets], best
        return calls

    def _compare(self, ours: dict[str, tuple[list[Callable], Any]], others: dict[str, Callable], kv: int):
        """Times of all kernels, and the largest difference from torch's result."""
        calls, found = {name: row for name, (row, _) in ours.items()}, {}
        for name, make in others.items():
            ready = devices.outcome(functools.partial(made, make), self.device)
            if isinstance(ready, dict):
                found[name] = ready
            else:
                calls[name] = ready
        results = {name: row[0]().float() for name, row in calls.items()}
        reference = next((results[name] for name in (SDPA, GATHERED) if name in results), None)
        times, records = self._times(calls, dict.fromkeys(calls, kv))
        found |= records
        for name, result in results.items():
            if reference is not None:
                found[name]["difference"] = float((result.view_as(reference) - reference).abs().max())
        return {
            "tiles": {name: asdict(tile) for name, (_, tile) in ours.items()},
            "times": found,
            "ratios": dict(_ratios(times)),
        }

    def _times(
        self, calls: dict[str, list[Callable]], read: dict[str, int]
    ) -> tuple[dict[str, Timing], dict[str, Any]]:
        """Times of the calls, and the same for JSON with rates for those that read so many bytes."""
        bursts = {name: devices.burst(row, self.device) for name, row in calls.items()}
        times, records = devices.time_bursts(bursts, self.repeat, self.seed), {}
        for name, timing in times.items():
            records[name] = one = timing.record(read.get(name))
            one |= {"us": 1e3 * one["median_ms"], "calls": bursts[name].calls, "graphed": bursts[name].graphed}
            if name in read:
                one["share_of_copy"] = one["gb_per_s"] / self.rate if self.rate else None
        return times, records

    def _codes(self, name: str, batch: int, kv_heads: int, size: int, tokens: int):
        """Codes of random keys, made in chunks, and the digest that made them."""
        config, selector = ScoutConfig(block_size=size, digest=name, gpu_kernels="triton"), None
        for first in range(0, tokens, FILL_TOKENS):
            keys = self._normal(batch, kv_heads, min(FILL_TOKENS, tokens - first), self.dim)
            selector = selector or Selector(config, 0, keys)
            selector.extend(keys, None)
        return selector.table.codes().contiguous(), selector.digest


def _ratios(times: dict[str, Timing]) -> Iterator[tuple[str, float]]:
    """Times divided by the plain kernel's; ``prefetch/plain`` is that of the better kind of prefetch."""
    plain = times[PLAIN].median
    for name, timing in times.items():
        if name != PLAIN:
            yield f"{name}/{PLAIN}", timing.median / plain
    better = min((times[name].median for name in (LINES, BULK) if name in times), default=math.nan)
    if math.isfinite(better):
        yield f"prefetch/{PLAIN}", better / plain


def parse_heads(text: str) -> tuple[int, int]:
    """The option ``--heads``: query heads and KV heads; ValueError if it is not two numbers with a slash between.

    >>> parse_heads("32/8")
    (32, 8)
    """
    try:
        query_heads, kv_heads = map(int, text.split("/"))
    except ValueError:
        raise ValueError(f"--heads {text}: allowed are query heads / KV heads; try 32/8") from None
    return query_heads, kv_heads
