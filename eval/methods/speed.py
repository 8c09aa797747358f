"""Decode steps of a model with random weights: one way, one context, one batch."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

import scout_hf
from scout_hf import CACHE
from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench import drift, gpu_models, llama
from scout_hf.eval.methods.drifting_tokens import DriftingInfiniGen
from scout_hf.eval.methods.held import told
from scout_hf.eval.methods.parts import taken_apart
from scout_hf.eval.methods.ways import FOLDED, RANDOM, Missing, cache_maker, find
from scout_hf.patches import family_of

SHAPES = {"gqa": {"num_key_value_heads": 8}, "mha": {"num_key_value_heads": 32}}
"""Query heads are 32 of 64 channels, the layer is that of Llama 3.2 1B; the vocabulary is small."""

TURN_TOKENS = 64
CHUNK_TOKENS = 4096
WARM_UPS = 4
FEWEST = 3
SPARE_BYTES = 1 << 30


@dataclass(frozen=True)
class Emulation:
    """Rates of another machine's link and CPU, in GB/s of KV; None for as fast as it goes."""

    link_gbps: float | None = None
    cpu_gbps: float | None = None

    def options(self) -> dict[str, float]:
        """For ``scout_hf.patch``."""
        return {name: value for name, value in vars(self).items() if value is not None}


def make_model(shape: str, layers: int, seed: int, device: str = "cpu") -> PreTrainedModel:
    """A model with random weights, of one of ``SHAPES`` or in the shape of a real one; or the one in a folder."""
    place = devices.find(device)
    if shape in SHAPES:
        return llama.make_model(seed, num_hidden_layers=layers, vocab_size=1024, **SHAPES[shape]).to(place)
    if shape in gpu_models.MODELS:
        return gpu_models.make_model(gpu_models.MODELS[shape], layers, place, seed)
    return AutoModelForCausalLM.from_pretrained(shape, dtype="auto", local_files_only=True).eval().to(place)


def check_shape(shape: str) -> None:
    """ValueError unless :func:`make_model` can make it."""
    known = (*SHAPES, *gpu_models.MODELS)
    if shape not in known and not Path(shape, "config.json").is_file():
        raise ValueError(
            f"--shape {shape} is neither a shape nor the folder of a model; shapes are {', '.join(known)}: try gqa"
        )


@torch.no_grad()
def fill(model: PreTrainedModel, cache: Cache, rows: int, tokens: int, seed: int = 0) -> None:
    """Keys and values that every layer makes of random inputs, without a forward pass; then a turn of some tokens.

    In that turn every method weighs and chooses what it keeps.
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
    model: PreTrainedModel,
    way_name: str,
    context: int,
    batch: int,
    budget: int,
    block_size: int,
    emulation: Emulation,
    drift_share: float,
    seconds: float,
    most_steps: int,
) -> dict[str, Any]:
    """Steps of one cell, as a dict for JSON; ``missing`` or ``oom`` where there are none."""
    way = find(way_name, RANDOM)
    on_device = model.device.type != "cpu"
    need = batch * context * llama.kv_bytes_per_token(model.config) * model.dtype.itemsize // llama.DTYPE.itemsize
    if 3.2 * need + SPARE_BYTES > psutil.virtual_memory().available:
        return {"oom": f"{need / 2**30:.1f} GiB of KV, several times in memory"}
    drift.settings_for(drift.correlation_for(drift_share, min(0.5, budget / context)), "auto" if on_device else "torch")
    DriftingInfiniGen.share = drift_share
    handle = None
    if way.patched:
        options = way.options | {"block_size": block_size} | (emulation.options() if way.emulated else {})
        if on_device and options.get("split") == "cpu":
            options["split"] = "auto"
        handle = scout_hf.patch(model, budget=budget, **options)
    try:
        cache = cache_maker(way, model, handle)()
        begin = time.perf_counter()
        fill(model, cache, batch, context)
        found = {"fill_s": round(time.perf_counter() - begin, 2)}
        with llama.folded(model) if way_name == FOLDED else nullcontext():
            return found | _steps(model, cache, handle, batch, seconds, most_steps)
    except Missing as why:
        return {"missing": str(why)}
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def _steps(model, cache, handle, batch: int, seconds: float, most_steps: int) -> dict[str, Any]:
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
    while len(taken) < FEWEST or (len(taken) < most_steps and time.perf_counter() - begin < seconds):
        taken.append(step())
    cpu = time.process_time() - cpu
    low, middle, high = (1e3 * float(value) for value in np.percentile(taken, (25, 50, 75)))
    # The mean: a step in which blocks are recalled takes longer, and a median would not tell.
    mean = 1e3 * sum(taken) / len(taken)
    found = {"step_ms": mean, "q1_ms": low, "median_ms": middle, "q3_ms": high}
    found |= {"steps": len(taken), "tokens_per_s": 1e3 * batch / mean, "cpu_ms": 1e3 * cpu / len(taken)}
    found |= told(handle, cache)
    return found | taken_apart(model, handle, cache, step, mean)
