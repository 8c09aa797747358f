"""Measures a machine's constants for the planner, in less than a minute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch

from scout_hf import CACHE, ScoutConfig
from scout_hf.eval.bench import machine
from scout_hf.eval.bench.models import make_llama
from scout_hf.eval.bench.timing import median_of
from scout_hf.eval.caches import DTYPE, caches_of, fill, kv_bytes_per_token
from scout_hf.kernels import attend
from scout_hf.kernels.cpu import BlockLists, make_backend
from scout_hf.planner import GIB, Machine
from scout_hf.selection import digest_for, make_digest
from scout_hf.stores import PagedKV

REPEAT = 7
ROWS, TOKENS, HEADS, GROUP, DIM, BLOCK = 4, 16384, 8, 4, 64, 32
SMALL = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


def measure(tell: Callable[[str], Any] = lambda line: None) -> tuple[Machine, dict[str, Any]]:
    """A machine without a GPU, and further rates by name; medians, with as many threads as torch uses."""
    if torch.cuda.is_available():
        tell("only the host is measured: for a GPU take its name, and --dram and --link from here")
    facts: dict[str, Any] = {}
    with torch.no_grad():
        tell("memory and products")
        facts["weights_gbps"], facts["products_tflops"] = _products()
        tell("attention, by torch and by native code")
        keys, values = (torch.randn(ROWS, HEADS, TOKENS, DIM).to(DTYPE) for _ in range(2))
        query = torch.randn(ROWS, HEADS * GROUP, 1, DIM).to(DTYPE)
        held = keys.nbytes + values.nbytes
        facts["attend_gbps"] = held / _seconds(lambda: attend(query, keys, values, 0.125)) / 1e9
        facts["cpu_gbps"] = _native(query, keys, values)
        tell("digests")
        facts["score_gbps"] = _scoring(query, keys)
        facts["copy_gbps"] = held / _seconds(lambda: (keys.clone(), values.clone())) / 1e9
        tell("stock attention, and what a layer costs besides")
        facts["stock_gbps"] = _stock()
        facts["layer_us"], facts["step_us"] = _overhead()
        facts["two_tier_layer_us"], _ = _overhead(split="cpu", budget=64, block_size=8, window=8)
    memory = psutil.virtual_memory().total / GIB
    found = Machine(
        machine.describe()["cpu"] or "cpu", memory, memory, facts["weights_gbps"], facts["attend_gbps"],
        facts["score_gbps"], facts["stock_gbps"], facts["products_tflops"], facts["layer_us"], facts["step_us"],
        facts["copy_gbps"], 20.0, facts["cpu_gbps"], gpu=False,
    )  # fmt: skip
    return found, facts | {"threads": torch.get_num_threads()}


def _seconds(call: Callable[[], Any]) -> float:
    return median_of(call, REPEAT)


def _products() -> tuple[float, float]:
    # More weights than any cache holds, a layer's worth each, one after the other as a step reads them.
    weights = [torch.randn(8192, 2048).to(DTYPE) for _ in range(8)]
    few, many = (torch.randn(rows, 2048).to(DTYPE) for rows in (1, 512))
    seconds = _seconds(lambda: [torch.nn.functional.linear(few, weight) for weight in weights])
    rate = sum(weight.nbytes for weight in weights) / seconds / 1e9
    seconds = _seconds(lambda: torch.nn.functional.linear(many, weights[0]))
    return rate, 2 * 512 * weights[0].numel() / seconds / 1e12


def _native(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> float:
    """Over scattered blocks, an eighth of all."""
    store = PagedKV(ROWS, HEADS, DIM, BLOCK, DTYPE, torch.device("cpu"))
    store.append(keys, values)
    chosen = torch.rand(ROWS, HEADS, store.blocks).topk(store.blocks // 8).indices.sort().values.to(torch.int32)
    lists, backend = BlockLists(chosen, None), make_backend()
    seconds = _seconds(lambda: backend.attend_blocks(query, store, lists, 0.125))
    backend.close()
    return (keys.nbytes + values.nbytes) / 8 / seconds / 1e9


def _scoring(query: torch.Tensor, keys: torch.Tensor) -> float:
    digest = make_digest(digest_for(ScoutConfig(), keys))
    blocks = keys.unflatten(2, (-1, BLOCK))
    digest.fit(blocks, None, None, 0.125)
    codes = digest.encode(blocks, None)
    backend = make_backend()
    prepared = digest.prepare(query)

    def native() -> Any:
        return backend.select(digest.native or "", prepared, codes, 64, 1, 1, BLOCK, None)

    seconds = _seconds((lambda: digest.score(query, codes)) if native() is None else native)
    backend.close()
    return codes.nbytes / seconds / 1e9


def _stock() -> float:
    """From what a step of one layer takes longer with a long cache."""
    model = make_llama(0, num_hidden_layers=1, vocab_size=64, intermediate_size=64)
    ids = torch.ones((1, 1), dtype=torch.long)

    def step_with(tokens: int) -> float:
        with caches_of(model) as caches:
            cache = fill(caches.new(), model.config, tokens)
            return _seconds(lambda: model(ids, **{CACHE: cache}))

    return TOKENS * kv_bytes_per_token(model.config) / (step_with(TOKENS) - step_with(64)) / 1e9


def _overhead(**options: Any) -> tuple[float, float]:
    """Microseconds per layer and per step of models that compute next to nothing."""

    def step_of(layers: int) -> float:
        model = make_llama(0, num_hidden_layers=layers, **SMALL)
        ids = torch.ones((1, 1), dtype=torch.long)
        with caches_of(model, **options) as caches:
            cache = fill(caches.new(), model.config, 256)
            return 1e6 * median_of(lambda: model(ids, **{CACHE: cache}), 15)

    few, many = step_of(2), step_of(10)
    layer = max(1.0, (many - few) / 8)
    return layer, max(1.0, few - 2 * layer)
