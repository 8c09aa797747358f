"""A machine's constants for the planner, read off the machine within a minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from transformers import DynamicCache

import scout_hf
from scout_hf import CACHE
from scout_hf.eval.bench import llama, machine
from scout_hf.kernels import attend
from scout_hf.kernels.cpu import BlockLists, make_backend
from scout_hf.planner import GIB, Machine
from scout_hf.selection import make_digest
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
        keys, values = (torch.randn(ROWS, HEADS, TOKENS, DIM).to(llama.DTYPE) for _ in range(2))
        query = torch.randn(ROWS, HEADS * GROUP, 1, DIM).to(llama.DTYPE)
        held = keys.nbytes + values.nbytes
        facts["attend_gbps"] = held / _median(lambda: attend(query, keys, values, 0.125)) / 1e9
        facts["cpu_gbps"] = _native(query, keys, values)
        tell("digests")
        facts["minmax_gbps"], facts["sign_gbps"] = (_scoring(name, query, keys) for name in ("minmax", "sign"))
        facts["copy_gbps"] = held / _median(lambda: (keys.clone(), values.clone())) / 1e9
        tell("stock attention, and what a layer costs besides")
        facts["stock_gbps"] = _stock()
        facts["layer_us"], facts["step_us"] = _overhead(None)
        facts["two_tier_layer_us"], _ = _overhead({"split": "cpu", "budget": 64, "block_size": 8, "window": 8})
    memory = psutil.virtual_memory().total / GIB
    found = Machine(
        machine.describe()["cpu"] or "cpu", memory, memory, facts["weights_gbps"], facts["attend_gbps"],
        facts["sign_gbps"], facts["stock_gbps"], facts["products_tflops"], facts["layer_us"], facts["step_us"],
        facts["copy_gbps"], 20.0, facts["cpu_gbps"], gpu=False,
    )  # fmt: skip
    return found, facts | {"threads": torch.get_num_threads()}


def _median(call: Callable[[], Any], repeat: int = REPEAT) -> float:
    call()
    taken = []
    for _ in range(repeat):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return sorted(taken)[repeat // 2]


def _products() -> tuple[float, float]:
    # More weights than any cache holds, a layer's worth each, one after the other as a step reads them.
    weights = [torch.randn(8192, 2048).to(llama.DTYPE) for _ in range(8)]
    few, many = (torch.randn(rows, 2048).to(llama.DTYPE) for rows in (1, 512))
    seconds = _median(lambda: [torch.nn.functional.linear(few, weight) for weight in weights])
    rate = sum(weight.nbytes for weight in weights) / seconds / 1e9
    seconds = _median(lambda: torch.nn.functional.linear(many, weights[0]))
    return rate, 2 * 512 * weights[0].numel() / seconds / 1e12


def _native(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> float:
    """Over scattered blocks, an eighth of all."""
    store = PagedKV(ROWS, HEADS, DIM, BLOCK, llama.DTYPE, torch.device("cpu"))
    store.append(keys, values)
    chosen = torch.rand(ROWS, HEADS, store.blocks).topk(store.blocks // 8).indices.sort().values.to(torch.int32)
    lists, backend = BlockLists(chosen, None), make_backend()
    seconds = _median(lambda: backend.attend_blocks(query, store, lists, 0.125))
    backend.close()
    return (keys.nbytes + values.nbytes) / 8 / seconds / 1e9


def _scoring(name: str, query: torch.Tensor, keys: torch.Tensor) -> float:
    digest = make_digest(name)
    blocks = keys.unflatten(2, (-1, BLOCK))
    digest.fit(blocks, None, None, 0.125)
    codes = digest.encode(blocks, None)
    backend = make_backend()
    if digest.native == "sign":
        prepared = digest.prepare(query)
        call = lambda: backend.select("sign", prepared, codes, 64, 1, 1, BLOCK, None)  # noqa: E731
        if call() is None:
            call = lambda: digest.score(query, codes)  # noqa: E731
    else:
        call = lambda: digest.score(query, codes)  # noqa: E731
    seconds = _median(call)
    backend.close()
    return codes.nbytes / seconds / 1e9


def _stock() -> float:
    """From what a step of one layer takes longer with a long cache."""
    model = llama.make_model(0, num_hidden_layers=1, vocab_size=64, intermediate_size=64)
    ids = torch.ones((1, 1), dtype=torch.long)

    def step_with(tokens: int) -> float:
        cache = llama.fill(DynamicCache(config=model.config), model.config, tokens)
        return _median(lambda: model(ids, **{CACHE: cache}))

    return TOKENS * llama.kv_bytes_per_token(model.config) / (step_with(TOKENS) - step_with(64)) / 1e9


def _overhead(options: dict[str, Any] | None) -> tuple[float, float]:
    """Microseconds per layer and per step of models that compute next to nothing."""

    def step_of(layers: int) -> float:
        model = llama.make_model(0, num_hidden_layers=layers, **SMALL)
        handle = scout_hf.patch(model, **options) if options else None
        cache = handle.new_cache() if handle else DynamicCache(config=model.config)
        llama.fill(cache, model.config, 256)
        ids = torch.ones((1, 1), dtype=torch.long)
        seconds = _median(lambda: model(ids, **{CACHE: cache}), 15)
        if handle:
            handle.remove()
        return 1e6 * seconds

    few, many = step_of(2), step_of(10)
    layer = max(1.0, (many - few) / 8)
    return layer, max(1.0, few - 2 * layer)
