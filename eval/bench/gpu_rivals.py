"""Kernels that the Triton decode kernel is compared with: calls over the same keys and values, one for each set.

``query`` is (batch, query_heads, 1, head_dim); a set is keys and values, (batch, kv_heads, tokens, head_dim) each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

WORKSPACE_BYTES = 128 << 20


def made(make: Callable[[], list[Callable]]) -> list[Callable] | dict[str, str]:
    """The calls of one rival, the first of which has run; ``{"absent": reason}`` if its library is not installed."""
    try:
        calls = make()
    except ImportError:
        return {"absent": "not installed"}
    calls[0]()
    return calls


def with_sdpa(query: torch.Tensor, sets: list) -> list[Callable]:
    """Torch's attention, with the kernel that torch chooses."""
    attend = torch.nn.functional.scaled_dot_product_attention
    return [functools.partial(attend, query, *part, enable_gqa=True) for part in sets]


def with_flash(query: torch.Tensor, sets: list) -> list[Callable]:
    """Torch's attention with its flash kernel; a call raises RuntimeError where that cannot run."""

    def only_flash(call):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return call()

    return [functools.partial(only_flash, call) for call in with_sdpa(query, sets)]


def with_flashinfer(query: torch.Tensor, sets: list) -> list[Callable]:
    """FlashInfer's batched decode; the plan is made once and is not part of a call."""
    import flashinfer

    batch, heads, _, dim = query.shape
    kv_heads, tokens = sets[0][0].shape[1:3]
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=query.device), "HND", use_tensor_cores=heads > kv_heads
    )
    # A row's whole context is its one page, so that it reads the same memory as all others.
    rows = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    last = torch.full((batch,), tokens, dtype=torch.int32, device=query.device)
    kinds = {"q_data_type": query.dtype, "kv_data_type": query.dtype}
    wrapper.plan(rows, rows[:batch].clone(), last, heads, kv_heads, dim, tokens, **kinds)
    return [lambda part=part: wrapper.run(query[:, :, 0], part) for part in sets]


def with_flash_attn(query: torch.Tensor, sets: list) -> list[Callable]:
    """FlashAttention's decode over a KV cache."""
    from flash_attn import flash_attn_with_kvcache

    tokens = torch.full((len(query),), sets[0][0].shape[2], dtype=torch.int32, device=query.device)
    asked = query.transpose(1, 2)
    return [
        lambda keys=keys, values=values: flash_attn_with_kvcache(
            asked, keys.transpose(1, 2), values.transpose(1, 2), cache_seqlens=tokens
        )
        for keys, values in sets
    ]


def by_gathering(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, sets: list) -> list[Callable]:
    """Gather the blocks from a pool, (pages, kv_heads, block_size, head_dim), then run torch's attention.

    The second part of each set is the pages, (batch, kv_heads, n).
    """
    head = torch.arange(keys.shape[1], device=keys.device)[None, :, None]

    def attend(pages):
        chosen = (pool[pages.long(), head].flatten(2, 3) for pool in (keys, values))
        return torch.nn.functional.scaled_dot_product_attention(query, *chosen, enable_gqa=True)

    return [functools.partial(attend, pages) for _, pages in sets]
