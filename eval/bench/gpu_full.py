"""Full attention on a GPU as fast as it gets: all KV in device memory, a split kernel, and the step in a CUDA graph.

The buffers have as many tokens as the context. A step writes its token over the last one and attends to all of them:
the work of a step at this length, with nothing that grows, so that it can be captured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface

from scout_hf import CACHE
from scout_hf.eval.bench import device as devices
from scout_hf.eval.bench.gpu_stages import first_line
from scout_hf.eval.caches import DTYPE, random_kv
from scout_hf.kernels import find_kernels

KERNEL, FOLDED = "triton", "sdpa"
ATTENTIONS = (KERNEL, FOLDED)
BLOCK_SIZE, WARM_UPS = 32, 3
_NAME = "scout_bench_full_{}"


class FixedLayer(DynamicLayer):
    """Buffers of keys and values, (batch, kv_heads, tokens, head_dim) each, whose last token is the newest."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self, *args: Any) -> int:
        """Tokens before the newest one."""
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        return self.keys.shape[2], 0


def full_cache(model: PreTrainedModel, tokens: int, rows: int, seed: int) -> DynamicCache:
    """A cache of random keys and values, of ``tokens`` tokens with the one that a step writes."""
    cache, size = DynamicCache(config=model.config), min(tokens, 4096)
    parts = [part.to(model.device) for part in random_kv(model.config, size, seed)]
    for place in range(len(cache.layers)):
        filled = []
        for part in parts:
            shape = (rows, part.shape[1], tokens, part.shape[3])
            filled.append(torch.empty(shape, dtype=DTYPE, device=model.device))
            for first in range(0, tokens, size):
                filled[-1][:, :, first : first + size] = part[:, :, : tokens - first]
        cache.layers[place] = FixedLayer(*filled)
    return cache


@contextmanager
def attending(model: PreTrainedModel, way: str) -> Iterator[None]:
    """The model attends with a kernel of :data:`ATTENTIONS` to all that its cache returns, without a mask."""
    name = _NAME.format(way)
    if name not in AttentionInterface._global_mapping:
        AttentionInterface.register(name, {KERNEL: _by_kernel, FOLDED: _by_sdpa}[way])
        AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def full_step(model: PreTrainedModel, cache: DynamicCache, rows: int) -> tuple[Callable[[], torch.Tensor], str | None]:
    """A function that takes a step and gives its logits, in a CUDA graph; or without, and why."""
    ids = torch.ones((rows, 1), dtype=torch.int64, device=model.device)
    places = torch.full((1, 1), cache.get_seq_length(), dtype=torch.int64, device=model.device)

    @torch.no_grad()
    def plain() -> torch.Tensor:
        return model(input_ids=ids, position_ids=places, **{CACHE: cache}, use_cache=True).logits

    for _ in range(WARM_UPS):
        out = plain()
    devices.wait(model.device)
    if model.device.type != "cuda":
        return plain, None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(model.device), torch.cuda.graph(graph):
            out = plain()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return plain, f"no graph: {first_line(error)}"

    def replayed() -> torch.Tensor:
        graph.replay()
        return out

    return replayed, None


def _by_sdpa(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **given: Any):
    """Torch's flash kernel, which splits long contexts; the heads of a GQA group are queries of one head."""
    batch, heads, _, dim = query.shape
    folded = query.view(batch, key.shape[1], -1, dim)
    backends = [SDPBackend.FLASH_ATTENTION] if query.is_cuda else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends):
        out = torch.nn.functional.scaled_dot_product_attention(folded, key, value, scale=given.get("scaling"))
    return out.reshape(batch, 1, heads, dim), None


def _by_kernel(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **given: Any):
    """The decode kernel of this package, as it attends to residents."""
    kernels, scale = find_kernels("triton", query.device), given.get("scaling") or 1 / math.sqrt(query.shape[-1])
    blocks = (part.unflatten(2, (-1, BLOCK_SIZE)) for part in (key, value))
    out, _ = kernels.merge(*kernels.attend_blocks(query, *blocks, scale), dtype=query.dtype)
    return out.transpose(1, 2), None
