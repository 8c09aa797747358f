"""Decode steps of a model with random weights: one way, one context, one batch."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

from scout_hf import CACHE
from scout_hf.diagnostics import busy_ms, step_shares
from scout_hf.eval import arms
from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench import drift
from scout_hf.eval.bench.drift import DriftingInfiniGen
from scout_hf.eval.bench.models import MODELS, make_llama
from scout_hf.eval.bench.models import make_model as make_shape
from scout_hf.eval.bench.timing import median_of
from scout_hf.eval.caches import DTYPE, kv_bytes_per_token, stats_and_bytes
from scout_hf.eval.methods.options import Methods
from scout_hf.kernels import attend
from scout_hf.patches import family_of

GPU_TO_CPU = 20.0
"""Attention on the paper's GPU against its CPU of 36 cores."""

CPU_TO_LINK = 100.0 / 15.0
"""That CPU's attention in GB/s of KV against PCIe 4.0 in pages of 32 tokens."""


@dataclass(frozen=True)
class Emulation:
    """Emulated rates of another machine's link and CPU, in GB/s of KV; None for no limit."""

    link_gbps: float | None = None
    cpu_gbps: float | None = None

    def options(self) -> dict[str, float]:
        """The rates as keyword arguments of ``scout_hf.patch``."""
        return {name: value for name, value in vars(self).items() if value is not None}


def emulation_of(
    emulate: str | None, link_gbps: float | None, cpu_gbps: float | None, block_size: int
) -> tuple[Emulation, str]:
    """The rates to emulate, from options, and how they were chosen.

    ``paper`` stands for the proportions of the paper's machine: this machine's attention on the calling thread is the
    GPU, link and CPU are slower than it by the paper's ratios. ValueError for another word, or if a rate is given too.
    """
    if emulate is None:
        given = Emulation(link_gbps, cpu_gbps)
        return given, "as given" if given.options() else "nothing is emulated"
    if emulate != "paper":
        raise ValueError(f"--emulate {emulate} is not known; allowed is 'paper', or give --link-gbps and --cpu-gbps")
    if link_gbps is not None or cpu_gbps is not None:
        raise ValueError("--emulate paper sets both rates; leave it out to give --link-gbps and --cpu-gbps")
    rate = device_gbps()
    cpu = round(rate / GPU_TO_CPU, 3)
    return Emulation(round(cpu / CPU_TO_LINK, 4), cpu), (
        "in the paper's proportions: attention of this machine's torch stands for the GPU, the CPU attends "
        f"{GPU_TO_CPU:.0f} times slower, the link is {CPU_TO_LINK:.1f} times slower again"
    )


def device_gbps() -> float:
    """GB/s of KV of torch's attention on this machine: one row, 32 query and 8 KV heads of 64, bf16."""
    keys, values = (torch.randn(1, 8, 8192, 64).to(torch.bfloat16) for _ in range(2))
    query = torch.randn(1, 32, 1, 64).to(torch.bfloat16)
    return 2 * keys.nbytes / median_of(lambda: attend(query, keys, values, 0.125), 9) / 1e9


SHAPES = {"gqa": {"num_key_value_heads": 8}, "mha": {"num_key_value_heads": 32}}
"""Query heads are 32 of 64 channels, the layer is that of Llama 3.2 1B; the vocabulary is small."""

TURN_TOKENS = 64
CHUNK_TOKENS = 4096
WARM_UPS, WATCHED = 4, 4
FEWEST, MOST_STEPS = 3, 60
SPARE_BYTES = 1 << 30


def make_model(shape: str, layers: int, seed: int, device: str = "cpu") -> PreTrainedModel:
    """The model to time; ValueError if there is no such device.

    One of ``SHAPES`` or of ``bench.models.MODELS``, with random weights, or the folder of a model.
    """
    place = devices.find(device)
    if shape in SHAPES:
        return make_llama(seed, num_hidden_layers=layers, vocab_size=1024, **SHAPES[shape]).to(place)
    if shape in MODELS:
        return make_shape(MODELS[shape], layers, place, seed)
    return AutoModelForCausalLM.from_pretrained(shape, dtype="auto", local_files_only=True).eval().to(place)


def check_shape(shape: str) -> None:
    """ValueError unless :func:`make_model` can make the ``--shape``."""
    known = (*SHAPES, *MODELS)
    if shape not in known and not Path(shape, "config.json").is_file():
        raise ValueError(
            f"--shape {shape} is neither a shape nor the folder of a model; shapes are {', '.join(known)}: try gqa"
        )


@torch.no_grad()
def fill(model: PreTrainedModel, cache: Cache, rows: int, tokens: int, seed: int = 0) -> None:
    """Fill a cache with keys and values of random inputs, without a forward pass, then run a turn of 64 tokens.

    In that turn every method selects what it keeps.
    """
    family, device, dtype = family_of(model), model.device, model.dtype
    decoder, random = family.decoder(model), torch.Generator(device).manual_seed(seed)
    for index, layer in enumerate(family.layers(decoder)):
        for first in range(0, tokens - TURN_TOKENS, CHUNK_TOKENS):
            count = min(CHUNK_TOKENS, tokens - TURN_TOKENS - first)
            hidden = torch.empty((1, count, decoder.config.hidden_size), dtype=dtype, device=device)
            hidden.normal_(generator=random)
            places = torch.arange(first, first + count, device=device)[None]
            made = family.keys_values(decoder, layer, hidden, places)
            cache.update(*(part.expand(rows, -1, -1, -1).contiguous() for part in made), index)
            method = getattr(cache.layers[index], "method", None)
            if hasattr(method, "remember"):
                method.remember(hidden.expand(rows, -1, -1).contiguous(), places)
    ids = torch.randint(decoder.config.vocab_size, (rows, TURN_TOKENS), generator=random, device=device)
    # Without the head: for the last of several tokens torch may copy all of it, which takes seconds.
    decoder(input_ids=ids, **{CACHE: cache}, use_cache=True)


def measure(
    cell: dict[str, Any], options: Methods, model: PreTrainedModel, emulation: Emulation, seconds: float
) -> dict[str, Any]:
    """Time the decode steps of one cell, for so many seconds, but at least 3 of them; figures for JSON.

    Only ``missing`` if the arm cannot run here, or ``oom`` if the KV does not fit into memory.
    """
    context, batch, budget, share = cell["context"], cell["batch"], options.budget, options.drift
    arm = arms.find(cell["way"], arms.RANDOM)
    on_device = model.device.type != "cpu"
    need = batch * context * kv_bytes_per_token(model.config) * model.dtype.itemsize // DTYPE.itemsize
    if 3.2 * need + SPARE_BYTES > psutil.virtual_memory().available:
        return {"oom": f"{need / 2**30:.1f} GiB of KV, several times in memory"}
    drift.settings_for(drift.correlation_for(share, min(0.5, budget / context)), "auto" if on_device else "torch")
    DriftingInfiniGen.share = share
    if on_device and arm.options and arm.options.get("split") == "cpu":
        arm = replace(arm, options=arm.options | {"split": "auto"})
    rates = emulation.options() if arm.emulated else {}
    try:
        with arm.caches(model, budget=budget, block_size=options.block_size, **rates) as caches:
            cache, begin = caches.new(), time.perf_counter()
            fill(model, cache, batch, context)
            found = {"fill_s": round(time.perf_counter() - begin, 2)}
            return found | _steps(model, cache, caches.handle, batch, seconds)
    except arms.Missing as why:
        return {"missing": str(why)}


@torch.no_grad()
def _steps(model, cache, handle, batch: int, seconds: float) -> dict[str, Any]:
    random = torch.Generator(model.device).manual_seed(1)
    taken: list[float] = []

    def step() -> float:
        ids = torch.randint(model.config.vocab_size, (batch, 1), generator=random, device=model.device)
        begin = time.perf_counter()
        model(ids, **{CACHE: cache}, logits_to_keep=1)
        devices.wait(model.device)
        return time.perf_counter() - begin

    first = step()
    for _ in range(min(WARM_UPS, max(1, int(seconds / 2 / first)))):
        step()
    if handle is not None:
        handle.reset_stats()
    # All threads of this process: finer than what the system's tables say.
    begin, cpu = time.perf_counter(), time.process_time()
    while len(taken) < FEWEST or (len(taken) < MOST_STEPS and time.perf_counter() - begin < seconds):
        taken.append(step())
    cpu = time.process_time() - cpu
    low, middle, high = (1e3 * float(value) for value in np.percentile(taken, (25, 50, 75)))
    # The mean: a step in which blocks are recalled takes longer, and a median would not tell.
    mean = 1e3 * sum(taken) / len(taken)
    found = {"step_ms": mean, "q1_ms": low, "median_ms": middle, "q3_ms": high}
    found |= {"steps": len(taken), "tokens_per_s": 1e3 * batch / mean, "cpu_ms": 1e3 * cpu / len(taken)}
    found |= stats_and_bytes(handle, cache)
    if model.device.type != "cuda":
        return found | {"shares": step_shares(model, handle, cache, step, WATCHED)}
    # Idle is what is left of an untraced step.
    busy = busy_ms(step, WATCHED, model.device)
    return found | ({"gpu_idle_share": max(0.0, 1.0 - busy["busy"] / mean)} if busy else {})
