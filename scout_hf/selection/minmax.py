"""Channel-wise minimum and maximum of a block's keys (Quest, arXiv 2406.10774; the digest of ScoutAttention)."""

from __future__ import annotations

import torch

from scout_hf.selection.digest import Digest, register_digest


@register_digest
class MinMax(Digest):
    """Upper bound of q.k over a block: ``sum_d max(q_d * min_d, q_d * max_d)``, summed over the GQA group.

    Two vectors per block in the dtype of the keys, which is ``1 / block_size`` of the block's KV. The bound equals
    ``relu(q) . max + min(q, 0) . min``, so a whole group costs one dot product of length ``2 * head_dim`` per block.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.selection import MinMax
    >>> codes = MinMax().encode(torch.randn(1, 2, 3, 4, 8), None)
    >>> codes.shape
    torch.Size([1, 2, 3, 16])
    >>> MinMax().score(torch.randn(1, 4, 1, 8), codes).shape
    torch.Size([1, 2, 3])
    """

    name = "minmax"
    native = "minmax"

    def encode(self, keys: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        if padding_mask is None:
            return torch.cat([keys.amax(dim=3), keys.amin(dim=3)], dim=-1)
        gone = ~padding_mask[:, None, :, :, None]
        high = keys.masked_fill(gone, -torch.inf).amax(dim=3)
        low = keys.masked_fill(gone, torch.inf).amin(dim=3)
        # A block of only padding has no bounds; zeros keep its score finite, and it is never chosen.
        return torch.cat([high, low], dim=-1).nan_to_num(posinf=0.0, neginf=0.0)

    def score(self, query: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        batch, kv_heads = codes.shape[:2]
        grouped = query.view(batch, kv_heads, -1, query.shape[-1]).float()
        signed = torch.cat([grouped.clamp(min=0).sum(2), grouped.clamp(max=0).sum(2)], dim=-1)
        # In half precision the bound itself can overflow; a weighted mean of codes cannot.
        weight = signed.abs().sum(-1, keepdim=True).clamp(min=1e-20)
        product = torch.matmul(codes, (signed / weight).to(codes.dtype).unsqueeze(-1)).squeeze(-1)
        return product.float() * weight
