"""One decode step of a whole model at several lengths of context: stock, stock at its best, and scout_hf.

The model has the shape of Llama 3.2 1B and random weights, the caches hold random keys and values: what is measured
does not depend on their meaning. Every timed step adds its token to the cache, as decoding does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import psutil
import torch
from transformers import Cache, DynamicCache, LlamaForCausalLM

import scout_hf
from scout_hf import CACHE
from scout_hf.diagnostics import MemoryReader, native_isa
from scout_hf.eval.bench import llama, machine, memory
from scout_hf.eval.bench.timing import Timing, interleave, timed
from scout_hf.stores import allocate_slab

STOCK, FOLDED, SCOUT, INT8 = "stock", "stock folded", "scout", "scout int8"
FIRST_TOKENS = 8
"""In the cache before the first step of a context of 0: what a step costs that has nothing to attend to."""

WARM_UPS = 2
LONG_SECONDS = 60.0
FEWEST = 3
SPAN_BYTES = 1 << 30
PREFILL_REPEAT = 3
WARM_UP_TOKENS = 256
SPARE_BYTES = 2 << 30


class Mode(NamedTuple):
    """One way to decode: a model, and what makes its caches."""

    model: LlamaForCausalLM
    new_cache: Callable[[], Cache]
    handle: scout_hf.Handle | None


def run(
    contexts: Sequence[int] = (0, 32768, 131072),
    budget: int = 2048,
    block_size: int = 32,
    threads: int | None = None,
    repeat: int = 20,
    layers: int = 16,
    prefill_tokens: int = 8192,
    prefill_layers: int = 2,
    memory_tokens: int = 32768,
    shape: dict[str, int] | None = None,
    seed: int = 0,
    tell: Callable[[str], Any] = lambda line: None,
) -> dict[str, Any]:
    """Measure everything and return it in a form that JSON takes.

    Parameters
    ----------
    contexts : sequence of int
        Tokens in the cache; 0 stands for a few.
    budget, block_size : int
        As in :class:`scout_hf.ScoutConfig`.
    threads : int or None
        CPUs to use; the process is kept on them meanwhile. None: as many as torch uses by itself.
    repeat : int
        Timed steps per mode and context; fewer, but at least three, where they would take longer than a minute.
    layers : int
    prefill_tokens, prefill_layers : int
        Length of the prompt, and layers of the model that reads it (0 tokens: none).
    memory_tokens : int
        Context for which the memory of a cache is measured (0: not at all).
    shape : dict, optional
        Other sizes of the model, as LlamaConfig takes them.
    seed : int
        Decides weights, keys and values, and the order of steps.
    tell : callable
        Called with a line now and then: what is going on, and warnings.
    """
    scout_hf.ScoutConfig(budget=budget, block_size=block_size)
    shape = (shape or {}) | {"num_hidden_layers": layers}
    threads = threads or min(torch.get_num_threads(), len(machine.usable_cpus()))
    settings = {name: value for name, value in locals().items() if name not in ("tell", "shape")}
    with machine.measuring(threads, tell) as company:
        tell(f"making a model of {layers} layers with random weights")
        model = llama.make_model(seed, **shape)
        most = llama.kv_bytes_per_token(model.config) * max(contexts)
        machine.check_memory(int(1.2 * most) + SPARE_BYTES, "lower --contexts or --layers")
        span = _bandwidth(threads, repeat)
        modes = _modes(model, budget, block_size)
        rows = [_decode(modes, context, repeat, seed, tell) for context in contexts]
        for mode in modes.values():
            if mode.handle:
                mode.handle.remove()
        prefill = _prefill(model, prefill_tokens, min(prefill_layers, layers), budget, block_size, seed, tell)
    held = []
    if memory_tokens:
        tell(f"measuring memory for {memory_tokens} tokens in processes of their own")
        held = [memory.in_fresh_process(kind, memory_tokens, budget, block_size, shape) for kind in memory.KINDS]
    weights = llama.weight_bytes(model)
    return {
        "benchmark": "cpu_decode",
        "settings": settings,
        "model": {
            **{name: getattr(model.config, name) for name in llama.SHAPE},
            "dtype": str(llama.DTYPE).removeprefix("torch."),
            "weight_bytes": weights,
            "kv_bytes_per_token": llama.kv_bytes_per_token(model.config),
        },
        "machine": machine.describe(),
        "company": company.record(),
        "read": span,
        "weights_read_ms": weights / span["gb_per_s"] / 1e6,
        "cache_grows": "by one token per step, warm-up included",
        "before_each_step": "one more step of the same mode, not timed",
        "contexts": rows,
        "prefill": prefill,
        "memory": held,
    }


def _modes(model: LlamaForCausalLM, budget: int, block_size: int) -> dict[str, Mode]:
    """All over the same weights; the model given is the first of them, and stays unpatched."""

    def stock():
        return DynamicCache(config=model.config)

    modes = {STOCK: Mode(model, stock, None), FOLDED: Mode(llama.twin(model, llama.FOLDED), stock, None)}
    for name, host_dtype in ((SCOUT, None), (INT8, "int8")):
        patched = llama.twin(model)
        handle = scout_hf.patch(patched, budget=budget, block_size=block_size, split="off", host_dtype=host_dtype)
        modes[name] = Mode(patched, handle.new_cache, handle)
    return modes


def _decode(modes: dict[str, Mode], context: int, repeat: int, seed: int, tell) -> dict[str, Any]:
    config = modes[STOCK].model.config
    kv = context * llama.kv_bytes_per_token(config)
    # Stock attention copies one layer's keys and values in every step; folded, it uses the same cache.
    together = 2.7 * kv + SPARE_BYTES < psutil.virtual_memory().available
    groups = [list(modes)] if together else [[STOCK, FOLDED], [SCOUT], [INT8]]
    found: dict[str, dict[str, Any]] = {}
    for names in groups:
        tell(f"context {context}: filling caches for {', '.join(names)}")
        found |= _time_group({name: modes[name] for name in names}, context, repeat, seed, tell)
    ratios = {
        f"{stock}/{ours}": found[stock]["median_ms"] / found[ours]["median_ms"]
        for stock in (STOCK, FOLDED)
        for ours in (SCOUT, INT8)
    }
    return {"context": context, "kv_bytes": kv, "interleaved": together, "modes": found, "ratios": ratios}


def _time_group(modes: dict[str, Mode], context: int, repeat: int, seed: int, tell) -> dict[str, dict[str, Any]]:
    """Steps of some modes, and in turn with them steps that have nothing to attend to."""
    caches, steps, counts = {}, {}, {}
    for name, mode in modes.items():
        if name == FOLDED:
            caches[name] = caches[STOCK]
        else:
            caches[name] = llama.fill(mode.new_cache(), mode.model.config, max(context, FIRST_TOKENS))
        steps[name] = _stepper(mode.model, caches[name])
        if context:
            empty = llama.fill(mode.new_cache(), mode.model.config, FIRST_TOKENS)
            steps[name, 0] = _stepper(mode.model, empty)
    for name, step in steps.items():
        seconds = min(timed(step) for _ in range(WARM_UPS))
        counts[name] = min(repeat, max(FEWEST, int(LONG_SECONDS / seconds)))
    tell(f"context {context}: timing " + ", ".join(f"{counts[name]} steps {name}" for name in modes))

    def after_another(step):
        # Decoding is one step after the other: what a stock step leaves behind (gigabytes of freed copies, cold
        # caches) must not be charged to the next mode.
        step()
        return step

    times = interleave({name: lambda step=step: after_another(step) for name, step in steps.items()}, counts, seed)
    weights, found = llama.weight_bytes(next(iter(modes.values())).model), {}
    for name, mode in modes.items():
        # What must be read once: weights, chosen keys and values, digests of all.
        held, digests = _held(caches[name])
        share = _share(mode, caches[name])
        zero = times.get((name, 0), times[name])
        found[name] = {
            **times[name].record(weights + share * held + digests),
            "bytes": weights + share * held + digests,
            "kv_share": share,
            "kv_read_bytes": share * held,
            "digest_bytes": digests,
            "copied_bytes": 2 * held if mode.handle is None else 0,
            "zero_context": zero.record(),
            "over_zero_context": times[name].median / zero.median,
        }
    return found


def _stepper(model: LlamaForCausalLM, cache: Cache) -> Callable[[], Any]:
    ids = torch.ones((1, 1), dtype=torch.long)

    @torch.no_grad()
    def step():
        return model(input_ids=ids, **{CACHE: cache}, use_cache=True)

    return step


def _share(mode: Mode, cache: Cache) -> float:
    """Tokens that one more step attends to, of those in the cache."""
    if mode.handle is None:
        return 1.0
    mode.handle.reset_stats()
    _stepper(mode.model, cache)()
    stats = mode.handle.stats()
    return stats.attended_tokens / stats.context_tokens


def _held(cache: Cache) -> tuple[int, int]:
    """Bytes of keys and values, and of the digests that a step scores."""
    if isinstance(cache, DynamicCache):
        parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        return sum(part.numel() * part.element_size() for part in parts), 0
    codes = [layer.method.selector.table.codes() for layer in cache.scout_layers if layer.method.selector.blocks]
    return cache.tier_bytes()["host"], sum(part.numel() * part.element_size() for part in codes)


def _prefill(model, tokens: int, layers: int, budget: int, block_size: int, seed: int, tell) -> dict[str, Any] | None:
    if not tokens:
        return None
    tell(f"prefill of {tokens} tokens through {layers} layers, {PREFILL_REPEAT} x 2 passes")
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))
    stock, patched = (llama.twin(model, layers=layers) for _ in range(2))
    handle = scout_hf.patch(patched, budget=budget, block_size=block_size, split="off")

    def prepare(which, new_cache):
        @torch.no_grad()
        def read(count=tokens):
            # Without the head: for the last of several tokens torch may copy all of it, which takes seconds.
            return which.model(input_ids=ids[:, :count], **{CACHE: new_cache()}, use_cache=True)

        return lambda: read

    calls = {
        STOCK: prepare(stock, lambda: DynamicCache(config=stock.config)),
        SCOUT: prepare(patched, handle.new_cache),
    }
    for call in calls.values():
        call()(min(tokens, WARM_UP_TOKENS))
    times: dict[str, Timing] = interleave(calls, PREFILL_REPEAT, seed)
    handle.remove()
    return {
        "tokens": tokens,
        "layers": layers,
        "head": False,
        **{name: timing.record() for name, timing in times.items()},
        "ratios": {f"{SCOUT}/{STOCK}": times[SCOUT].median / times[STOCK].median},
    }


def _bandwidth(threads: int, repeat: int) -> dict[str, Any]:
    """The machine's own sequential read rate on so many threads."""
    memory = allocate_slab((SPAN_BYTES,), torch.uint8, torch.device("cpu")).fill_(1)
    reader = MemoryReader(threads) if native_isa() else None
    numbers = memory.view(torch.int64)

    def read():
        return reader.span(memory) if reader else numbers.sum()

    read()
    timing = interleave({"read": lambda: read}, repeat)["read"]
    if reader:
        reader.close()
    return {"bytes": SPAN_BYTES, "by": "native" if reader else "torch.sum", **timing.record(SPAN_BYTES)}
