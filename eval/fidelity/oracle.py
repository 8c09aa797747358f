"""Blocks by their true attention mass: what a perfect digest would choose, to compare real ones with."""

from __future__ import annotations

import torch

from scout_hf.selection import Digest, register_digest


@register_digest
class OracleBlocks(Digest):
    """The keys themselves as the code; a block's score is its softmax mass, summed over the GQA group.

    The mass is that among whole blocks, at the usual scale of ``head_dim ** -0.5``: what is newer is attended in any
    case. As large as the keys and as slow as full attention, for evaluations without padding only.
    """

    name = "oracle"

    def encode(self, keys: torch.Tensor, exists: torch.Tensor | None) -> torch.Tensor:
        """The keys of a block side by side, (batch, kv_heads, blocks, block_size * head_dim)."""
        if exists is not None and not bool(exists.all()):
            raise ValueError("digest='oracle' takes no padding; give it rows of equal length")
        return keys.flatten(3)

    def score(self, query: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Mass of every block, (batch, kv_heads, blocks)."""
        batch, heads, blocks, _ = codes.shape
        dim = query.shape[-1]
        grouped = query.view(batch, heads, -1, dim)
        logits = torch.matmul(grouped, codes.view(batch, heads, -1, dim).transpose(2, 3)).float() * dim**-0.5
        return logits.softmax(-1).unflatten(-1, (blocks, -1)).sum(-1).sum(2)
