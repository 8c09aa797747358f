"""Attention over scattered blocks, and the choice of blocks, beside bare reads of the same memory and beside torch.

Keys and values come from memory, not from a processor cache: several caches take turns, every call gets a selection
of its own, and before blocks are chosen more memory is read than the last cache level holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from scout_hf import ScoutConfig
from scout_hf.diagnostics import MemoryReader, native_isa
from scout_hf.eval.bench import machine
from scout_hf.eval.bench.options import CpuKernel, Tell, all_but, check_sizes, silent
from scout_hf.eval.bench.timing import Timing, interleave
from scout_hf.eval.caches import DTYPE, tensor_bytes
from scout_hf.kernels.cpu import BlockLists, make_backend
from scout_hf.selection import Digest, MinMax, Selector, choose, coarse_for
from scout_hf.stores import allocate_slab, huge_page_bytes, make_store

CACHES = 3
FILL_TOKENS = 8192
ERROR_TOKENS, ERROR_CACHE_TOKENS = 4096, 16384
OUTLIER_CHANNELS, OUTLIER_FACTORS, OFFSET = 4, (10.0, 30.0), 2.0
WARM_UPS = 2
SIGN_CODES = ("sign", "sign2")


def run(options: CpuKernel, tell: Tell = silent, seed: int = 0) -> dict[str, Any]:
    """Measure everything, of one row in bf16, and return it in a form that JSON takes."""
    (query_heads, kv_heads), head_dim, block_size = options.heads, options.head_dim, options.block_size
    tokens, cache_tokens, repeat, dense = options.tokens, options.cache_tokens, options.repeat, options.dense
    settings = all_but(options, "heads", "out") | {"query_heads": query_heads, "kv_heads": kv_heads}
    _check(options)
    with machine.measuring(options.threads, tell) as company:
        bench = _Bench(options, seed)
        tell(f"filling {CACHES} bf16 and {CACHES} int8 caches of {cache_tokens} tokens")
        bench.fill()
        rows = []
        for count in tokens:
            tell(f"attending to {count} of {cache_tokens} tokens, {repeat} x 6 calls")
            rows.append(bench.attend(count, repeat))
        tell(f"choosing among {bench.blocks} blocks, {repeat} x {5 * (1 + len(bench.signs))} calls")
        select = bench.select(tokens, repeat)
        if dense:
            tell(f"torch over all {cache_tokens} tokens, {dense} x 2 calls")
        whole = bench.dense(dense) if dense else None
        bench.close()
        tell("comparing int8 with bf16")
        errors = {kind: int8_error(kind, query_heads, kv_heads, head_dim, block_size, seed) for kind in KEYS}
    if whole:
        for row in rows:
            row["ratios"]["dense_folded/native"] = whole["folded"]["median_ms"] / row["native"]["median_ms"]
    return {
        "benchmark": "cpu_kernel",
        "settings": settings | {"seed": seed, "caches": CACHES},
        "machine": machine.describe(),
        "company": company.record(),
        "kv_on_huge_pages": bench.huge_share,
        "attend": rows,
        "select": select,
        "dense": whole,
        "int8_error": errors,
    }


class _Bench:
    def __init__(self, options: CpuKernel, seed: int):
        (self.heads, self.kv_heads), self.dim, self.size = options.heads, options.head_dim, options.block_size
        self.tokens, self.blocks = options.cache_tokens, options.cache_tokens // options.block_size
        self.seed, self.turn = seed, 0
        self.random = torch.Generator().manual_seed(seed)
        self.reader = MemoryReader(options.threads)
        self.native, self.torch = make_backend("native"), make_backend("torch")
        self.config = ScoutConfig(block_size=self.size, digest="minmax")

    def fill(self) -> None:
        self.plain, self.packed, self.codes = [], [], []
        for _ in range(CACHES):
            plain = make_store(1, self.kv_heads, self.dim, self.size, DTYPE, "cpu")
            packed = make_store(1, self.kv_heads, self.dim, self.size, DTYPE, "cpu", "int8")
            for first in range(0, self.tokens, FILL_TOKENS):
                shape = (1, self.kv_heads, min(FILL_TOKENS, self.tokens - first), self.dim)
                keys, values = (torch.empty(shape, dtype=DTYPE).normal_(generator=self.random) for _ in range(2))
                plain.append(keys, values)
                packed.append(keys, values)
            selector = Selector(self.config, 0, plain.read(0, 0)[0])
            selector.extend_from(plain, self.blocks, None)
            self.plain.append(plain)
            self.packed.append(packed)
            self.codes.append(selector.table.codes())
        # One table each will do: what is read before every choice leaves nothing of it in a processor cache.
        self.signs = {}
        for name in SIGN_CODES:
            selector = Selector(ScoutConfig(block_size=self.size, digest=name), 0, self.plain[0].read(0, 0)[0])
            selector.extend_from(self.plain[0], self.blocks, None)
            if self._scored(selector):
                self.signs[name] = selector
        self.kv_bytes = self.plain[0].used_bytes
        stores = [*self.plain, *self.packed]
        slabs = [slab for store in stores for slab in store.table.pool.slabs]
        self.huge_share = min(1.0, huge_page_bytes(slabs) / sum(store.used_bytes for store in stores))
        # More than any cache level holds, and long enough to time.
        cache = machine.last_level_cache_bytes() or 64 << 20
        self.long = allocate_slab((max(2 * cache, min(self.kv_bytes, 512 << 20)),), torch.uint8, torch.device("cpu"))
        self.long.fill_(1)

    def close(self) -> None:
        self.reader.close()
        self.native.close()
        self.torch.close()
        del self.plain, self.packed, self.codes, self.signs, self.long

    def attend(self, tokens: int, repeat: int) -> dict[str, Any]:
        """All that reads one selection of so many tokens."""
        count = tokens // self.size
        calls = {
            "native": lambda: self._attend(self.native, self.plain, count),
            "read": lambda: self._read(self.plain, count),
            "torch": lambda: self._attend(self.torch, self.plain, count),
            "int8": lambda: self._attend(self.native, self.packed, count),
            "int8_read": lambda: self._read(self.packed, count),
            "sequential": lambda: lambda: self.reader.span(self.long),
        }
        times, share = self._time(calls, repeat), count / self.blocks
        plain, packed = (int(stores[0].used_bytes * share) for stores in (self.plain, self.packed))
        read = {"int8": packed, "int8_read": packed, "sequential": self.long.numel()}
        row = {name: times[name].record(read.get(name, plain)) for name in calls}
        ratios = _ratios(times, "read/native", "torch/native", "native/int8", "int8_read/int8")
        ratios["native_rate/sequential_rate"] = row["native"]["gb_per_s"] / row["sequential"]["gb_per_s"]
        return {"tokens": tokens, "kv_bytes": plain, "int8_bytes": packed, **row, "ratios": ratios}

    def select(self, tokens: Sequence[int], repeat: int) -> dict[str, Any]:
        """The choice of blocks for the largest budget that is at most 4096 tokens, by min/max and by sign codes."""
        budget = max((count for count in tokens if count <= 4096), default=min(tokens))
        count, sinks = budget // self.size, self.config.blocks(self.config.sinks)
        plain = self._choices(MinMax(), self.codes, count, sinks)
        calls = dict(plain)
        for kind, selector in self.signs.items():
            coded = self._choices(selector.digest, [selector.table.codes()], count, sinks)
            calls |= {f"{kind}_{name}": call for name, call in coded.items()}
            coarse = self._coarse(selector, count, sinks)
            calls |= {} if coarse is None else {f"{kind}_coarse": coarse}
        times = self._time(calls, repeat)
        size = tensor_bytes(self.codes[0])
        found = {
            "blocks": self.blocks,
            "chosen": count,
            "digest_bytes": size,
            **{name: times[name].record(size) for name in plain},
            "ratios": _ratios(times, "native/read", "native_score/read", "torch/native"),
        }
        for kind, selector in self.signs.items():
            size = tensor_bytes(selector.table.codes())
            beside = (f"{kind}_native/native", f"{kind}_native_score/native_score")
            beside += (f"{kind}_native/{kind}_read", f"{kind}_torch/{kind}_native")
            names = list(plain)
            if f"{kind}_coarse" in times:
                names.append("coarse")
                beside += (f"{kind}_coarse/{kind}_read",)
            found[kind] = {
                "digest_bytes": size,
                **{name: times[f"{kind}_{name}"].record(size) for name in names},
                "ratios": _ratios(times, *beside),
            }
        return found

    def _scored(self, selector: Selector) -> bool:
        """Whether native code scores these codes; it takes a limited number of bits per token."""
        digest, codes = selector.digest, selector.table.codes()
        return self.native.score(digest.native, digest.prepare(self._query()), codes, block_size=self.size) is not None

    def _coarse(self, selector: Selector, count: int, sinks: int) -> Callable[[], Callable[[], Any]] | None:
        """The choice as a step makes it: by signs alone first, then of the best blocks by whole codes."""
        digest, codes = selector.digest, selector.table.codes()
        coarse = coarse_for(digest, self._query().shape[3], codes.shape[2], count)
        if coarse is None:
            return None

        def prepare():
            query, cold = self._query(), self._cold([codes])
            rest = cold, count, sinks, 0, self.size, None, None, coarse
            return lambda: self.native.select(digest.native, digest.prepare(query), *rest)

        return prepare

    def _choices(self, digest: Digest, tables: list[torch.Tensor], count: int, sinks: int) -> dict[str, Any]:
        """Calls that choose by such digests, natively and by torch, that only score, and that only read."""

        def choice(work: Callable[[torch.Tensor, torch.Tensor], Any]) -> Callable[[], Callable[[], Any]]:
            def prepare():
                query, codes = self._query(), self._cold(tables)
                return lambda: work(query, codes)

            return prepare

        def native(query, codes):
            return self.native.select(digest.native, digest.prepare(query), codes, count, sinks, 0, self.size, None)

        def score(query, codes):
            return self.native.score(digest.native, digest.prepare(query), codes, block_size=self.size)

        def read():
            # Head by head, since the table reserves capacity behind the codes of each head.
            codes = self._cold(tables)
            parts = [codes[0, head] for head in range(self.kv_heads)]
            return lambda: [self.reader.span(part) for part in parts]

        def by_torch(query, codes):
            return choose(digest.score(query, codes), count, sinks, None)

        calls = {"native": native, "native_score": score, "torch": by_torch, "torch_score": digest.score}
        return {"read": read} | {name: choice(call) for name, call in calls.items()}

    def dense(self, repeat: int) -> dict[str, Any]:
        """Torch's attention over one whole cache, in both forms of a grouped query."""
        keys, values = self.plain[0].read(0, self.tokens)
        attend = torch.nn.functional.scaled_dot_product_attention

        def folded():
            query = self._query().view(1, self.kv_heads, -1, self.dim)
            return lambda: attend(query, keys, values)

        def grouped():
            query = self._query()
            return lambda: attend(query, keys, values, enable_gqa=True)

        times = interleave({"folded": folded, "enable_gqa": grouped}, repeat, self.seed)
        record = {name: timing.record(self.kv_bytes) for name, timing in times.items()}
        return {"tokens": self.tokens, "kv_bytes": self.kv_bytes, **record}

    def _time(self, calls, repeat: int) -> dict[str, Timing]:
        for _ in range(WARM_UPS):
            for prepare in calls.values():
                prepare()()
        return interleave(calls, repeat, self.seed)

    def _attend(self, backend, stores, count: int):
        query, lists, store = self._query(), self._lists(count), self._next(stores)
        return lambda: backend.attend_blocks(query, store, lists, self.dim**-0.5)

    def _read(self, stores, count: int):
        lists, store = self._lists(count), self._next(stores)
        return lambda: self.reader.tiles(store, lists)

    def _query(self) -> torch.Tensor:
        return torch.randn((1, self.heads, 1, self.dim), generator=self.random).to(DTYPE)

    def _lists(self, count: int) -> BlockLists:
        return random_lists(self.kv_heads, self.blocks, count, self.random)

    def _next(self, things: list) -> Any:
        self.turn += 1
        return things[self.turn % len(things)]

    def _cold(self, things: list) -> Any:
        self.reader.span(self.long)
        return self._next(things)


def random_lists(heads: int, blocks: int, count: int, random: torch.Generator) -> BlockLists:
    """Ascending lists of ``count`` of ``blocks`` blocks, another one for each KV head."""
    drawn = torch.rand((1, heads, blocks), generator=random).argsort(dim=2)[:, :, :count]
    return BlockLists(drawn.sort(dim=2).values.to(torch.int32), None)


# -- what int8 costs in accuracy ------------------------------------------------------------------------------------


def _normal(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=random)


def _outliers(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Keys as models have them: an offset per channel, and a few channels much larger than the rest."""
    heads, dim = shape[1], shape[3]
    low, high = OUTLIER_FACTORS
    factors = torch.ones(1, heads, 1, dim)
    for head in range(heads):
        large = torch.randperm(dim, generator=random)[:OUTLIER_CHANNELS]
        factors[0, head, 0, large] = low + (high - low) * torch.rand(len(large), generator=random)
    offsets = OFFSET * torch.randn(factors.shape, generator=random)
    return (torch.randn(shape, generator=random) + offsets) * factors


KEYS = {"normal": _normal, "outliers": _outliers}


def int8_error(
    kind: str, query_heads: int, kv_heads: int, head_dim: int, block_size: int, seed: int
) -> dict[str, float]:
    """How far attention over an int8 store is from that over a bf16 one, and both from float64, on the same numbers.

    Keys are those of ``KEYS[kind]``, values are normal. Largest differences of LSE and output; ``relative`` ones are of
    the whole output, as root mean squares.
    """
    random = torch.Generator().manual_seed(seed)
    shape = (1, kv_heads, ERROR_CACHE_TOKENS, head_dim)
    keys, values = KEYS[kind](shape, random).to(DTYPE), _normal(shape, random).to(DTYPE)
    query = torch.randn((1, query_heads, 1, head_dim), generator=random).to(DTYPE)
    lists = random_lists(kv_heads, ERROR_CACHE_TOKENS // block_size, ERROR_TOKENS // block_size, random)
    backend, found = make_backend("native"), {}
    for name, host_dtype in (("bf16", None), ("int8", "int8")):
        store = make_store(1, kv_heads, head_dim, block_size, DTYPE, "cpu", host_dtype)
        store.append(keys, values)
        partial = backend.attend_blocks(query, store, lists, head_dim**-0.5).partial
        found[name] = partial.out.double().view(-1, head_dim), partial.lse.double().view(-1)
    backend.close()
    found["exact"] = _exact(query, keys, values, lists, block_size)
    record = {"tokens": ERROR_TOKENS, "score_deviation": _score_deviation(query, keys)}
    for one, other in (("int8", "bf16"), ("int8", "exact"), ("bf16", "exact")):
        (out, lse), (out2, lse2) = found[one], found[other]
        record[f"{one}_to_{other}"] = {
            "lse": float((lse - lse2).abs().max()),
            "out": float((out - out2).abs().max()),
            "relative": float((out - out2).norm() / out2.norm()),
        }
    return record


def _exact(query, keys, values, lists: BlockLists, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    heads, dim = keys.shape[1], keys.shape[3]
    places = (lists.ids.long()[0, :, :, None] * block_size + torch.arange(block_size)).flatten(1)
    places = places[:, :, None].expand(-1, -1, dim)
    chosen_keys, chosen_values = (part[0].gather(1, places).double() for part in (keys, values))
    scores = query.double().view(heads, -1, dim) @ chosen_keys.transpose(1, 2) * dim**-0.5
    return (scores.softmax(-1) @ chosen_values).view(-1, dim), scores.logsumexp(-1).view(-1)


def _score_deviation(query, keys) -> float:
    """Standard deviation of scores within a head, which tells how peaked the attention is."""
    heads, dim = keys.shape[1], keys.shape[3]
    scores = query.float().view(heads, -1, dim) @ keys[0].float().transpose(1, 2) * dim**-0.5
    return float(scores.std(-1).mean())


def _ratios(times: dict[str, Timing], *names: str) -> dict[str, float]:
    parts = [name.split("/") for name in names]
    return {f"{above}/{below}": times[above].median / times[below].median for above, below in parts}


def _check(options: CpuKernel) -> None:
    tokens, cache_tokens, head_dim = options.tokens, options.cache_tokens, options.head_dim
    if native_isa() is None:
        raise ValueError("there is no native library to measure; reinstall scout_hf with g++ or clang at hand")
    ScoutConfig(block_size=options.block_size)
    check_sizes([options.heads], options.block_size, (*tokens, cache_tokens))
    if head_dim % 32:
        raise ValueError(f"--head-dim {head_dim}: allowed are multiples of 32; try 128")
    if max(tokens) > cache_tokens:
        raise ValueError(f"--tokens {max(tokens)}: the cache has {cache_tokens}; select less, or raise --cache-tokens")
    each = 2 * cache_tokens * options.heads[1] * head_dim * DTYPE.itemsize
    machine.check_memory(math.ceil(1.6 * CACHES * each) + 3 * each, "lower --cache-tokens")
