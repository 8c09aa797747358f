"""The Triton kernels for ``bench gpu``, with and without prefetch, beside torch, FlashInfer and FlashAttention.

All read the same keys and values, and read them from memory: where these would fit into the device's last cache level,
several copies take turns. Calls are captured in CUDA graphs, so that what the CPU takes to launch them does not count.
The best tile for residents is kept for later decoding, which makes the same call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch

from scout_hf import ScoutConfig
from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench.cpu_kernel import random_lists
from scout_hf.eval.bench.gpu_rivals import by_gathering, made, with_flash, with_flash_attn, with_flashinfer, with_sdpa
from scout_hf.eval.bench.gpu_stages import Given, Job
from scout_hf.eval.bench.timing import Timing, timed
from scout_hf.eval.caches import DTYPE, tensor_bytes
from scout_hf.eval.tables import short
from scout_hf.kernels import find_kernels
from scout_hf.selection import Selector, mean_share

HEADS, HEAD_DIM, BLOCK_SIZE = (32, 8), 128, 32
DENSE = ((8, 8192), (8, 65536), (16, 32768))
"""Rows and tokens that a step with full attention reads."""
SELECTED, OF_TOKENS, ROWS = 2048, 65536, 8
DIGESTS = ("minmax", "sign", "sign2")
REPEAT, JOB_SECONDS = 7, 60.0
PLAIN, LINES, BULK = "plain", "prefetch lines", "prefetch bulk"
SDPA, FLASH, FLASHINFER, FLASH_ATTN = "sdpa", "sdpa flash", "flashinfer", "flash_attn"
GATHERED = "gathered by torch"
RIVALS = {SDPA: with_sdpa, FLASH: with_flash, FLASHINFER: with_flashinfer, FLASH_ATTN: with_flash_attn}
FILL_TOKENS = 8192


def jobs(given: Given) -> list[Job]:
    """Attention to whole contexts and to scattered blocks, and scores of digests."""
    place = devices.find(given.settings["device"])
    rate = given.known.get("machine", {}).get("copies on the GPU", {}).get("gb_per_s")
    bench = Bench(place, find_kernels("triton", place), HEAD_DIM, REPEAT, given.settings["seed"], rate)
    residents = functools.partial(bench.residents, *HEADS, BLOCK_SIZE, ROWS, SELECTED)
    cells: dict[str, Callable[[], tuple]] = {f"residents, {ROWS} x {short(SELECTED)}": residents}
    cells |= {
        f"all of {rows} x {short(tokens)}": functools.partial(bench.dense, *HEADS, BLOCK_SIZE, rows, tokens)
        for rows, tokens in DENSE
    }
    scattered = functools.partial(bench.scattered, *HEADS, BLOCK_SIZE, ROWS, SELECTED, OF_TOKENS)
    cells[f"{short(SELECTED)} of {ROWS} x {short(OF_TOKENS)}, scattered"] = scattered
    for name in DIGESTS:
        score = functools.partial(bench.score, *HEADS, BLOCK_SIZE, OF_TOKENS, name, ROWS, SELECTED)
        cells[f"{name} scores, {ROWS} x {short(OF_TOKENS)}"] = score
    return [Job(name, functools.partial(bench.guarded, cell), JOB_SECONDS) for name, cell in cells.items()]


class Bench:
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
        return self._contiguous(heads, kv_heads, size, batch, tokens, None)

    def residents(self, heads: int, kv_heads: int, size: int, batch: int, tokens: int):
        """Attention to residents as decoding calls it, with the block number of each slot; the best tile is kept."""
        drawn = torch.Generator().manual_seed(self.seed)
        ids = random_lists(batch * kv_heads, tokens // size, tokens // size, drawn).ids
        ids = ids.view(batch, kv_heads, -1).to(self.device, torch.int32)
        return self._contiguous(heads, kv_heads, size, batch, tokens, ids)

    def _contiguous(self, heads: int, kv_heads: int, size: int, batch: int, tokens: int, ids: torch.Tensor | None):
        kv = 2 * batch * kv_heads * tokens * self.dim * DTYPE.itemsize
        turns = devices.copies(kv, self.device)
        where = self._where(heads, kv_heads, size, batch, tokens) | {"kv_bytes": kv, "copies": turns}

        def measure():
            query = self._normal(batch, heads, 1, self.dim)
            keys, values = (self._normal(turns, batch, kv_heads, tokens, self.dim) for _ in range(2))
            sets = list(zip(keys, values))

            def attend(part, tile):
                blocks = (each.unflatten(2, (-1, size)) for each in part)
                return self._attend(query, *blocks, ids=ids, tile=tile)

            calls = self._tiles(query, keys[0].unflatten(2, (-1, size)), sets, attend, keep=ids is not None)
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

            calls = self._tiles(query, keys, sets, attend, keep=False)
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

    def _tiles(self, query, keys, sets, attend, keep: bool) -> dict[str, tuple[list[Callable], Any]]:
        """Calls with the best tile of each kind of prefetch; ``keep`` the best of all for decoding."""
        from scout_hf.kernels.triton import prefetch, tuning

        kinds = {PLAIN: prefetch.OFF, LINES: prefetch.LINES, BULK: prefetch.BULK}
        if self.device.type == "cuda":
            run = functools.partial(attend, sets[0])
            times = tuning.tune(query, keys, run) if keep else tuning.times_of(self.device, run)
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
