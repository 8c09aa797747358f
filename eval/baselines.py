"""Blocks chosen without looking at them, as controls: what is left of the answers when selection knows nothing.

Importing this module makes ``ScoutConfig(digest="random")`` and ``ScoutConfig(digest="recent")`` available. Sinks and
window are attended as with any other digest, so all choices spend the same budget.
"""

from __future__ import annotations

import torch

from scout_hf.selection import Digest, register_digest


class Blind(Digest):
    """A digest without content: one byte per block and head, so that blocks can be counted."""

    def encode(self, keys: torch.Tensor, exists: torch.Tensor | None) -> torch.Tensor:
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
