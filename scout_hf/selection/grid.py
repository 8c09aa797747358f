"""Channel-wise bounds (Quest) quantised to an integer grid: half the bytes, or four times as many bounds per byte.

Each channel of a KV head has its own grid, fitted to the first keys, so outlier channels do not coarsen the others.
The offset of a grid is the same for all blocks and does not change the order of scores; its step is multiplied into
the query.
"""

from __future__ import annotations

import torch

from scout_hf.selection.digest import Digest, register_digest, repeat_real
from scout_hf.selection.minmax import MinMax

# Later keys may lie slightly outside the fitted range.
MARGIN = 1.05


class GridMinMax(Digest):
    """Bounds of every ``sub`` tokens as integers of ``bits`` bits; a block's score is the maximum over its parts.

    Queries are summed over the GQA group before that maximum, so a part costs one dot product of length
    ``2 * head_dim``.
    """

    bits: int
    sub: int
    needs_fit = True

    def fit(
        self, keys: torch.Tensor, padding_mask: torch.Tensor | None, query_power: torch.Tensor | None, scale: float
    ) -> None:
        bounds = MinMax().encode(keys, padding_mask).float().nan_to_num(0.0, 0.0, 0.0)
        # Blocks of only padding have bounds of zero, which can only widen the grid.
        high, low = (half.amax(2, keepdim=True) for half in (bounds, -bounds))
        high, low = high.chunk(2, dim=-1)[0], -low.chunk(2, dim=-1)[1]
        self.middle = (high + low) / 2
        self.step = ((high - low) * MARGIN / (2**self.bits - 1)).clamp(min=1e-30)

    def select_rows(self, rows: torch.Tensor) -> None:
        self.middle, self.step = self.middle[rows.to(self.step.device)], self.step[rows.to(self.step.device)]

    def encode(self, keys: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        size = keys.shape[3]
        sub = min(self.sub, size)
        if padding_mask is not None:
            keys = repeat_real(keys, padding_mask)
        bounds = MinMax().encode(keys.unflatten(3, (-1, sub)).flatten(2, 3), None)
        high, low = ((half.float() - self.middle) / self.step for half in bounds.chunk(2, dim=-1))
        most = 2 ** (self.bits - 1) - 1
        # Rounded outwards, so that they stay bounds within the range of the grid.
        codes = torch.cat([high.ceil(), low.floor()], dim=-1).nan_to_num(0.0).clamp(-most - 1, most).to(torch.int8)
        return self.store(codes.unflatten(2, (-1, size // sub)).flatten(3))

    def store(self, codes: torch.Tensor) -> torch.Tensor:
        """Pack integers of ``bits`` bits, given as int8, for storage."""
        return codes

    def load(self, codes: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`store`."""
        return codes

    def prepare(self, query: torch.Tensor) -> torch.Tensor:
        """Weights of the bounds of one part, (batch, kv_heads, 1, 2 * head_dim) of float32."""
        grouped = query.float().view(*self.step.shape[:2], -1, query.shape[-1])
        high, low = grouped.clamp(min=0).sum(2, keepdim=True), grouped.clamp(max=0).sum(2, keepdim=True)
        return torch.cat([high * self.step, low * self.step], dim=-1)

    def score(self, query: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        weights = self.prepare(query)
        parts = self.load(codes).unflatten(3, (-1, weights.shape[-1])).float()
        return torch.matmul(parts, weights[:, :, :, :, None]).squeeze(-1).amax(3)


@register_digest
class Int8MinMax(GridMinMax):
    """Channel-wise bounds of a block in int8: half the bytes of :class:`MinMax` in bf16.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.selection import Int8MinMax
    >>> digest, keys = Int8MinMax(), torch.randn(1, 2, 3, 16, 8)
    >>> digest.fit(keys, None, None, 8**-0.5)
    >>> digest.encode(keys, None).shape
    torch.Size([1, 2, 3, 16])
    """

    name, native, bits, sub = "minmax-int8", "dots", 8, 1 << 30


@register_digest
class SubMinMax(GridMinMax):
    """Channel-wise bounds of every 8 tokens in 4 bits: at ``block_size=32``, as many bytes as :class:`MinMax` in bf16.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.selection import SubMinMax
    >>> digest, keys = SubMinMax(), torch.randn(1, 2, 3, 16, 8)
    >>> digest.fit(keys, None, None, 8**-0.5)
    >>> digest.encode(keys, None).shape
    torch.Size([1, 2, 3, 16])
    """

    name, native, bits, sub = "minmax-sub", "dots4", 4, 8

    def store(self, codes: torch.Tensor) -> torch.Tensor:
        even, odd = codes[..., ::2].view(torch.uint8) & 15, codes[..., 1::2].view(torch.uint8)
        return even | (odd << 4)

    def load(self, codes: torch.Tensor) -> torch.Tensor:
        # Shift to the top of the byte first, so that the arithmetic shift back extends the sign.
        halves = torch.stack([(codes << 4).view(torch.int8), codes.view(torch.int8)], dim=-1)
        return (halves >> 4).flatten(3)
