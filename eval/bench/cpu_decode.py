"""One decode step of a whole model at several lengths of context: stock, the fastest form of stock, and scout_hf.

The model has the shape of Llama 3.2 1B and random weights, the caches hold random keys and values: what is measured
does not depend on their meaning. Every timed step adds its token to the cache, as decoding does.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import psutil
import torch
from transformers import Cache, LlamaForCausalLM

import scout_hf
from scout_hf import CACHE, ScoutCache
from scout_hf.eval.arms import CPU_DECODE, FOLDED
from scout_hf.eval.bench import bandwidth, machine, memory
from scout_hf.eval.bench.models import SHAPE, make_llama, twin, weight_bytes
from scout_hf.eval.bench.options import CpuDecode, Tell, all_but, silent
from scout_hf.eval.bench.timing import interleave, timed
from scout_hf.eval.caches import DTYPE, Caches, fill, kv_bytes, kv_bytes_per_token, tensor_bytes

STOCK, SCOUT, EXACT, INT8 = "stock", "scout", "scout exact", "scout int8"
Mode = tuple[LlamaForCausalLM, Caches]
FIRST_TOKENS = 8
"""In the cache before the first step of a context of 0: what a step costs that has nothing to attend to."""

WARM_UPS = 2
LONG_SECONDS = 60.0
FEWEST = 3
PREFILL_REPEAT = 3
WARM_UP_TOKENS = 256
PRODUCT_TOKENS, PRODUCTS = 1024, 5
SPARE_BYTES = 2 << 30


def run(options: CpuDecode, tell: Tell = silent, shape: dict[str, int] | None = None, seed: int = 0) -> dict[str, Any]:
    """Measure everything and return it in a form that JSON takes.

    0 tokens stand for a few in ``contexts`` and for none elsewhere; ``shape`` has other sizes of the model, as
    LlamaConfig takes them. Slow steps are timed less often than ``repeat`` says, three times at least.
    """
    contexts, repeat, layers, memory_tokens = options.contexts, options.repeat, options.layers, options.memory_tokens
    budget, block_size, prefill_layers = options.budget, options.block_size, min(options.prefill_layers, layers)
    scout_hf.ScoutConfig(budget=budget, block_size=block_size)
    shape = (shape or {}) | {"num_hidden_layers": layers}
    threads = options.threads or min(torch.get_num_threads(), len(machine.usable_cpus()))
    settings = all_but(options, "out") | {"threads": threads, "seed": seed}
    with machine.measuring(threads, tell) as company:
        tell(f"making a model of {layers} layers with random weights")
        model = make_llama(seed, **shape)
        most = kv_bytes_per_token(model.config) * max(contexts) * options.batch
        machine.check_memory(int(1.2 * most) + SPARE_BYTES, "lower --contexts or --layers")
        span = bandwidth.read_rate(threads, repeat)
        with ExitStack() as stack:
            # All modes share the same weights.
            modes: dict[str, Mode] = {}
            for name, arm in CPU_DECODE.items():
                mine = twin(model)
                modes[name] = mine, stack.enter_context(arm.caches(mine, budget=budget, block_size=block_size))
            rows = [_decode(modes, context, options.batch, repeat, seed, tell) for context in contexts]
        prefill = _prefill(model, options.prefill_tokens, prefill_layers, budget, block_size, seed, tell)
    held = []
    if memory_tokens:
        tell(f"measuring memory for {memory_tokens} tokens in processes of their own")
        held = [memory.in_fresh_process(kind, memory_tokens, budget, block_size, shape) for kind in memory.KINDS]
    weights = weight_bytes(model)
    return {
        "benchmark": "cpu_decode",
        "settings": settings,
        "model": {
            **{name: getattr(model.config, name) for name in SHAPE},
            "dtype": str(DTYPE).removeprefix("torch."),
            "weight_bytes": weights,
            "kv_bytes_per_token": kv_bytes_per_token(model.config),
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


def _decode(modes: dict[str, Mode], context: int, batch: int, repeat: int, seed: int, tell) -> dict[str, Any]:
    config = modes[STOCK][0].config
    kv = batch * context * kv_bytes_per_token(config)
    # Stock attention copies one layer's keys and values in every step; folded, it uses the same cache.
    together = 2.7 * kv + SPARE_BYTES < psutil.virtual_memory().available
    groups = [list(modes)] if together else [[STOCK, FOLDED], [SCOUT], [EXACT], [INT8]]
    found: dict[str, dict[str, Any]] = {}
    for names in groups:
        tell(f"context {context}: filling caches for {', '.join(names)}")
        found |= _time_group({name: modes[name] for name in names}, context, batch, repeat, seed, tell)
    ratios = {
        f"{stock}/{ours}": found[stock]["median_ms"] / found[ours]["median_ms"]
        for stock in (STOCK, FOLDED)
        for ours in (SCOUT, EXACT, INT8)
    }
    return {"context": context, "kv_bytes": kv, "interleaved": together, "modes": found, "ratios": ratios}


def _time_group(
    modes: dict[str, Mode], context: int, batch: int, repeat: int, seed: int, tell
) -> dict[str, dict[str, Any]]:
    """Steps of some modes, interleaved with steps over an empty context."""
    caches, steps, counts = {}, {}, {}
    for name, (model, made) in modes.items():
        tokens = max(context, FIRST_TOKENS)
        caches[name] = caches[STOCK] if name == FOLDED else fill(made.new(), model.config, tokens, batch)
        steps[name] = _stepper(model, caches[name], batch)
        if context:
            steps[name, 0] = _stepper(model, fill(made.new(), model.config, FIRST_TOKENS, batch), batch)
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
    weights, found = weight_bytes(next(iter(modes.values()))[0]), {}
    for name, mode in modes.items():
        # What must be read once: weights, chosen keys and values, digests of all.
        held, digests = read_bytes(caches[name])
        share = _share(mode, caches[name], batch)
        zero, least = times.get((name, 0), times[name]), weights + share * held + digests
        found[name] = {
            **times[name].record(least),
            "bytes": least,
            "kv_share": share,
            "kv_read_bytes": share * held,
            "digest_bytes": digests,
            "copied_bytes": 0 if mode[1].handle else 2 * held,
            "zero_context": zero.record(),
            "over_zero_context": times[name].median / zero.median,
        }
    return found


def _stepper(model: LlamaForCausalLM, cache: Cache, batch: int) -> Callable[[], Any]:
    ids = torch.ones((batch, 1), dtype=torch.long)

    @torch.no_grad()
    def step():
        return model(input_ids=ids, **{CACHE: cache}, use_cache=True)

    return step


def _share(mode: Mode, cache: Cache, batch: int) -> float:
    """Tokens that one more step attends to, of those in the cache."""
    model, (_, handle) = mode
    if handle is None:
        return 1.0
    handle.reset_stats()
    _stepper(model, cache, batch)()
    stats = handle.stats()
    return stats.attended_tokens / stats.context_tokens


def read_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes of keys and values of a cache, and of the digests that a sparse step scores."""
    if not isinstance(cache, ScoutCache):
        return kv_bytes(cache)["stock"], 0
    selectors = [layer.method.selector for layer in cache.scout_layers]
    return kv_bytes(cache)["host"], tensor_bytes([one.table.codes() for one in selectors if one.blocks])


def _product_rate(model: LlamaForCausalLM) -> float:
    """Operations per second of torch's product of many tokens with the largest matrix of a layer."""
    weight = model.model.layers[0].mlp.up_proj.weight
    inputs = torch.ones(PRODUCT_TOKENS, weight.shape[1], dtype=weight.dtype)
    times = [timed(lambda: torch.nn.functional.linear(inputs, weight)) for _ in range(PRODUCTS)]
    return 2 * weight.numel() * PRODUCT_TOKENS / min(times)


def _flop_of_prompt(model: LlamaForCausalLM, tokens: int, layers: int) -> dict[str, float]:
    """What a prompt takes through some layers: products with weights, and causal attention."""
    weights = sum(one.numel() for one in model.model.layers[0].parameters() if one.dim() == 2)
    channels = model.config.num_attention_heads * model.config.head_dim
    return {"weights": 2.0 * weights * tokens * layers, "attention": 2.0 * channels * tokens**2 * layers}


def _prefill(model, tokens: int, layers: int, budget: int, block_size: int, seed: int, tell) -> dict[str, Any] | None:
    if not tokens:
        return None
    tell(f"prefill of {tokens} tokens through {layers} layers, {PREFILL_REPEAT} x 2 passes")
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))

    def prepare(which, made: Caches):
        @torch.no_grad()
        def read(count=tokens):
            # Without the head: for the last of several tokens torch may copy all of it, which takes seconds.
            return which.model(input_ids=ids[:, :count], **{CACHE: made.new()}, use_cache=True)

        return lambda: read

    with ExitStack() as stack:
        calls = {}
        for name in (STOCK, SCOUT):
            short = twin(model, layers=layers)
            made = stack.enter_context(CPU_DECODE[name].caches(short, budget=budget, block_size=block_size))
            calls[name] = prepare(short, made)
            calls[name]()(min(tokens, WARM_UP_TOKENS))
        times = interleave(calls, PREFILL_REPEAT, seed)
    rate, needed = _product_rate(model), _flop_of_prompt(model, tokens, layers)
    return {
        "tokens": tokens,
        "layers": layers,
        "head": False,
        "product_gflop_per_s": rate / 1e9,
        "gflop": {name: one / 1e9 for name, one in needed.items()},
        "limit_ms": 1e3 * sum(needed.values()) / rate,
        **{name: timing.record() for name, timing in times.items()},
        "ratios": {f"{SCOUT}/{STOCK}": times[SCOUT].median / times[STOCK].median},
    }
