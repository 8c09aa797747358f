"""Control digests: blocks selected blindly, and those that a perfect digest would select.

Importing this module makes ``ScoutConfig(digest="random")``, ``"recent"`` and ``"oracle"`` available. Sinks and window
are attended as with any other digest, so all have the same budget.
"""

from __future__ import annotations

import torch

from scout_hf.selection import Digest, register_digest


class Blind(Digest):
    """A digest without content: one byte per block and head, so that blocks can be counted."""

    def encode(self, keys: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Zeros, (batch, kv_heads, blocks, 1)."""
        return torch.zeros((*keys.shape[:3], 1), dtype=torch.uint8, device=keys.device)


@register_digest
class RandomBlocks(Blind):
    """Other blocks in every step, layer and KV head, drawn from torch's global generator."""

    name = "random"

    def score(self, query: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Uniform noise, (batch, kv_heads, blocks)."""
        return torch.rand(codes.shape[:3], dtype=torch.float32, device=codes.device)


@register_digest
class RecentBlocks(Blind):
    """The newest blocks, as a sliding window with sinks would keep them."""

    name = "recent"

    def score(self, query: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """The block's number, (batch, kv_heads, blocks)."""
        order = torch.arange(codes.shape[2], dtype=torch.float32, device=codes.device)
        return order.repeat(*codes.shape[:2], 1)


@register_digest
class OracleBlocks(Digest):
    """The keys themselves as the code; a block's score is its softmax mass, summed over the GQA group.

    The mass is that among whole blocks, at the usual scale of ``head_dim ** -0.5``: what is newer is attended in any
    case. As large as the keys and as slow as full attention, for evaluations without padding only.
    """

    name = "oracle"

    def encode(self, keys: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """The keys of a block side by side, (batch, kv_heads, blocks, block_size * head_dim)."""
        if padding_mask is not None and not bool(padding_mask.all()):
            raise ValueError("digest='oracle' takes no padding; give it rows of equal length")
        return keys.flatten(3)

    def score(self, query: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Mass of every block, (batch, kv_heads, blocks)."""
        batch, heads, blocks, _ = codes.shape
        dim = query.shape[-1]
        grouped = query.view(batch, heads, -1, dim)
        logits = torch.matmul(grouped, codes.view(batch, heads, -1, dim).transpose(2, 3)).float() * dim**-0.5
        return logits.softmax(-1).unflatten(-1, (blocks, -1)).sum(-1).sum(2)
