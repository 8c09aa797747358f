"""Outlier channels written into a model's weights such that full attention stays what it was.

Real models have key channels far larger than the rest, or far from zero, which queries hardly use. ``scale`` makes two
pairs of RoPE channels of each KV head eight times larger in the key and as much smaller in the query: every product is
the same. ``offset`` also shifts one pair of key channels by a constant, which adds the same to all logits of a query.
RoPE would turn that constant from position to position, so the slowest pair is first kept from turning at all; with a
usual base it turns by a few hundredths over a long document, and full attention is measured on that same model.
"""

from __future__ import annotations

import random

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from scout_hf import CACHE

FACTOR = 8.0
PAIRS = 2
SHIFT = 6.0
SEED = 20260327
SMALLEST_HEAD = 12


def apply_stress(model: PreTrainedModel, stress: str, sample: torch.Tensor) -> None:
    """Change an unpatched model's weights in place; Llama, Qwen2, Qwen3 and others laid out like them.

    ``none`` and ``rivals`` change nothing. ``sample`` has token ids (1, tokens) of an ordinary text, from which
    standard deviations are taken. Raises ValueError for a model whose attention has no ``q_proj`` and ``k_proj``, or
    heads of less than 12 channels.
    """
    if stress in ("none", "rivals"):
        return
    attentions = [layer.self_attn for layer in model.get_decoder().layers if hasattr(layer, "self_attn")]
    if not attentions or not all(hasattr(attention, "q_proj") for attention in attentions):
        raise ValueError(f"stress={stress!r}: {type(model).__name__} has no q_proj and k_proj to change; use 'none'")
    if attentions[0].head_dim < SMALLEST_HEAD:
        raise ValueError(f"stress={stress!r}: heads of {attentions[0].head_dim} channels are too small; use 'none'")
    heads = model.config.get_text_config(decoder=True).num_key_value_heads
    with torch.no_grad():
        for index, attention in enumerate(attentions):
            rng = random.Random(f"{SEED}-{index}")
            if hasattr(attention, "k_norm"):
                _scale_norms(attention, rng)
            else:
                _scale_projections(attention, rng, heads)
        if stress == "offset":
            model.get_decoder().rotary_emb.inv_freq[-1] = 0.0
            for attention, spread in zip(attentions, _spreads(model, sample)):
                _shift(attention, spread)


def _pairs(rng: random.Random, dim: int) -> list[int]:
    """Both channels of ``PAIRS`` pairs out of the slower half; the slowest stays free for ``offset``."""
    half = dim // 2
    chosen = rng.sample(range(half // 2, half - 1), PAIRS)
    return [channel for pair in chosen for channel in (pair, pair + half)]


def _scale_projections(attention: nn.Module, rng: random.Random, heads: int) -> None:
    dim = attention.head_dim
    group = attention.q_proj.out_features // dim // heads
    for head in range(heads):
        for channel in _pairs(rng, dim):
            rows = [(attention.k_proj, head * dim + channel, FACTOR)]
            rows += [(attention.q_proj, (head * group + i) * dim + channel, 1 / FACTOR) for i in range(group)]
            for projection, row, factor in rows:
                projection.weight[row] *= factor
                if projection.bias is not None:
                    projection.bias[row] *= factor


def _scale_norms(attention: nn.Module, rng: random.Random) -> None:
    """A norm behind the projections would undo a change of their rows; its own weights are shared by all heads."""
    channels = _pairs(rng, attention.head_dim)
    attention.k_norm.weight[channels] *= FACTOR
    attention.q_norm.weight[channels] /= FACTOR


def _spreads(model: PreTrainedModel, sample: torch.Tensor) -> list[torch.Tensor]:
    """Standard deviation of every key channel over a text, a tensor (kv_heads, head_dim) per layer."""
    cache = DynamicCache(config=model.config)
    model(sample, **{CACHE: cache}, logits_to_keep=1)
    return [layer.keys.float().std(dim=(0, 2)) for layer in cache.layers]


def _shift(attention: nn.Module, spread: torch.Tensor) -> None:
    """Add ``SHIFT`` standard deviations to both channels of the pair that does not turn."""
    heads, dim = spread.shape
    offset = torch.zeros_like(spread)
    for channel in (dim // 2 - 1, dim - 1):
        offset[:, channel] = SHIFT * spread[:, channel]
    if hasattr(attention, "k_norm"):
        attention.k_norm = Shifted(attention.k_norm, offset.to(attention.k_norm.weight.dtype))
        return
    flat = offset.flatten().to(attention.k_proj.weight.dtype)
    bias = attention.k_proj.bias
    attention.k_proj.bias = nn.Parameter(flat if bias is None else bias + flat, requires_grad=False)


class Shifted(nn.Module):
    """A norm over heads with a constant added to what it gives, (..., kv_heads, head_dim)."""

    def __init__(self, norm: nn.Module, offset: torch.Tensor):
        super().__init__()
        self.norm = norm
        self.register_buffer("offset", offset)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """``norm(states) + offset``; states are (batch, tokens, kv_heads, head_dim)."""
        return self.norm(states) + self.offset
