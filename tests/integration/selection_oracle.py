"""What sparse decoding should attend to, written out in plain loops, and a stock model that attends to exactly that.

Nothing here imports scout_hf: the rules are those of ScoutConfig's documentation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "selection_oracle"


@dataclass
class Rules:
    """Settings of ScoutConfig, by the same names; ``two_tiers`` is split="cpu" without recall and prediction."""

    budget: int | float | None
    block_size: int = 8
    sinks: int = 4
    window: int = 8
    dense_layers: tuple = ()
    resident: int | None = None
    two_tiers: bool = False
    readers: tuple = ()
    """Layers that attend over the KV of another one, which has settled before."""


@dataclass
class Oracle:
    """The rules, the padding of the present pass, and what was chosen; one per generation."""

    rules: Rules
    mask: torch.Tensor | None = None
    residents: dict = field(default_factory=dict)
    attended: dict = field(default_factory=dict)

    def blocks(self, tokens: float) -> int:
        """Whole blocks that hold so many tokens."""
        return math.ceil(tokens / self.rules.block_size)

    def pick(self, layer: int, queries, keys, real, open_blocks: int) -> list[int]:
        """Blocks for one row and KV head, best first.

        ``queries`` (group, head_dim) of the group's heads, ``keys`` (tokens, head_dim), ``real`` (tokens,) of bool.
        """
        rules, size = self.rules, self.rules.block_size
        offered = [b for b in range(open_blocks) if real[b * size : (b + 1) * size].any()]
        if rules.budget is None or layer in rules.dense_layers:
            return offered
        tokens = math.ceil(rules.budget * int(real.sum())) if isinstance(rules.budget, float) else rules.budget
        count = max(1, self.blocks(tokens) - self.blocks(rules.window))
        if count >= open_blocks:
            return offered
        scores = {}
        for block in offered:
            here = slice(block * size, (block + 1) * size)
            inside = keys[here][real[here]].double()
            low, high = inside.min(0).values, inside.max(0).values
            scores[block] = sum(torch.maximum(q * low, q * high).sum().item() for q in queries.double())
        first = offered[: self.blocks(rules.sinks)]
        rest = sorted(offered, key=lambda block: scores[block], reverse=True)
        return (first + [block for block in rest if block not in first])[:count]

    def allowed(self, layer: int, row: int, head: int, queries, keys) -> torch.Tensor:
        """Tokens that this row and KV head attends to in a decode step, bool (tokens,)."""
        size, total = self.rules.block_size, len(keys)
        real = torch.ones(total, dtype=torch.bool) if self.mask is None else self.mask[row]
        held = total // size - self.blocks(self.rules.window)
        if self.rules.two_tiers and layer not in self.rules.readers:
            # What this step's token fills stays in the tail until the step is over.
            held = (total - 1) // size - self.blocks(self.rules.window)
        held = max(held, 0)
        chosen = set(self.pick(layer, queries, keys, real, held))
        if self.rules.two_tiers:
            chosen |= self.resident_blocks(layer, row, head, held)
        allowed = torch.zeros(total, dtype=torch.bool)
        allowed[held * size :] = True
        for block in chosen:
            allowed[block * size : (block + 1) * size] = True
        return allowed & real

    def capacity(self) -> int:
        """Blocks that stay resident; 2048 tokens where neither ``resident`` nor ``budget`` says."""
        return self.blocks(self.rules.resident or self.rules.budget or 2048)

    def resident_blocks(self, layer: int, row: int, head: int, held: int) -> set[int]:
        """Residents chosen after the prompt, plus what was written back since while there were free slots."""
        chosen, known = self.residents[layer, row, head]
        for block in range(known, held):
            if len(chosen) < self.capacity():
                chosen.append(block)
        self.residents[layer, row, head] = chosen, max(known, held)
        return set(chosen)

    def prefilled(self, layer: int, row: int, head: int, queries, keys) -> None:
        """The prompt is in: its last query chooses the residents."""
        real = torch.ones(len(keys), dtype=torch.bool) if self.mask is None else self.mask[row]
        held = max(len(keys) // self.rules.block_size - self.blocks(self.rules.window), 0)
        self.residents[layer, row, head] = self.pick(layer, queries, keys, real, held)[: self.capacity()], held


ACTIVE: list[Oracle] = []


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention as transformers calls it, in float64: dense in a prompt, by the oracle's choice in a decode step."""
    oracle, layer = ACTIVE[-1], module.layer_idx
    oracle.mask = None if attention_mask is None else attention_mask.bool()
    batch, heads, length, _ = query.shape
    group, total = heads // key.shape[1], key.shape[2]
    out = query.new_zeros((*query.shape[:3], value.shape[3]))
    for row in range(batch):
        for kv in range(key.shape[1]):
            span = slice(kv * group, (kv + 1) * group)
            queries, keys, values = query[row, span], key[row, kv], value[row, kv].double()
            if length == 1:
                allowed = oracle.allowed(layer, row, kv, queries[:, 0], keys)[None]
                oracle.attended.setdefault(layer, []).append(int(allowed.sum()))
            else:
                allowed = torch.arange(total) <= torch.arange(total - length, total)[:, None]
                if oracle.mask is not None:
                    allowed = allowed & oracle.mask[row]
                    # Padding with nothing before it looks at itself, as nobody looks at it.
                    itself = torch.eye(total, dtype=torch.bool)[total - length :]
                    allowed = allowed | itself & ~allowed.any(-1, keepdim=True)
                oracle.prefilled(layer, row, kv, queries[:, -1], keys)
            scores = queries.double() @ keys.double().T * scaling
            weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
            out[row, span] = (weights @ values).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: kwargs.get("attention_mask"))
