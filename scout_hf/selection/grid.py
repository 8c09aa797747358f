"""Minimum and maximum on an integer grid: the bounds of Quest at half the bytes, or for four times as many tokens.

Each channel of a KV head has its own grid, taken from the first keys, so outlier channels cost the others nothing.
Where a grid starts is the same for all blocks and drops out of the choice; only its step is left, and it goes to the
query.
"""

from __future__ import annotations

import torch

from scout_hf.selection.digest import Digest, register_digest, repeat_real
from scout_hf.selection.minmax import MinMax

# Keys that come later may lie a little outside of what has been seen.
MARGIN = 1.05


class GridMinMax(Digest):
    """Bounds of every ``sub`` tokens as integers of ``bits`` bits; the score of a block is its best part's.

    Bounds are folded over the GQA group before the best part is taken, so a part costs one dot product of twice the
    head size.
    """

    bits: int
    sub: int
    needs_fit = True

    def fit(
        self, keys: torch.Tensor, padding_mask: torch.Tensor | None, query_power: torch.Tensor | None, scale: float
    ) -> None:
        bounds = MinMax().encode(keys, padding_mask).float().nan_to_num(0.0, 0.0, 0.0)
        # Blocks of nothing but padding have zeros for bounds, which widens a grid that does not hold zero.
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
        # Rounded outwards, so that they stay bounds wherever the grid reaches.
        codes = torch.cat([high.ceil(), low.floor()], dim=-1).nan_to_num(0.0).clamp(-most - 1, most).to(torch.int8)
        return self.store(codes.unflatten(2, (-1, size // sub)).flatten(3))

    def store(self, codes: torch.Tensor) -> torch.Tensor:
        """Integers of ``bits`` bits, as int8, as they are kept."""
        return codes

    def load(self, codes: torch.Tensor) -> torch.Tensor:
        """What :meth:`store` was given."""
        return codes

    def prepare(self, query: torch.Tensor) -> torch.Tensor:
        """Weights of one part's numbers, float32 (batch, kv_heads, 1, 2 * head_dim)."""
        grouped = query.float().view(*self.step.shape[:2], -1, query.shape[-1])
        high, low = grouped.clamp(min=0).sum(2, keepdim=True), grouped.clamp(max=0).sum(2, keepdim=True)
        return torch.cat([high * self.step, low * self.step], dim=-1)

    def score(self, query: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        weights = self.prepare(query)
        parts = self.load(codes).unflatten(3, (-1, weights.shape[-1])).float()
        return torch.matmul(parts, weights[:, :, :, :, None]).squeeze(-1).amax(3)


@register_digest
class Int8MinMax(GridMinMax):
    """Half the bytes of bf16 bounds."""

    name, native, bits, sub = "minmax-int8", "dots", 8, 1 << 30


@register_digest
class SubMinMax(GridMinMax):
    """Bounds of every 8 tokens in 4 bits: at block 32, the bytes of bf16 bounds."""

    name, native, bits, sub = "minmax-sub", "dots4", 4, 8

    def store(self, codes: torch.Tensor) -> torch.Tensor:
        even, odd = codes[..., ::2].view(torch.uint8) & 15, codes[..., 1::2].view(torch.uint8)
        return even | (odd << 4)

    def load(self, codes: torch.Tensor) -> torch.Tensor:
        # To the top of the byte first, so that the shift back brings the sign along.
        halves = torch.stack([(codes << 4).view(torch.int8), codes.view(torch.int8)], dim=-1)
        return (halves >> 4).flatten(3)
