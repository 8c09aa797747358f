"""One or two bits per key channel and token, of rotated, balanced keys, with a scale per token.

A block may matter because of a single token, so the code keeps every token. Keys are centred and balanced per channel,
rotated by a fixed random rotation, and reduced to a few levels and one scale per token. ``scale * (levels . q)`` is
then an unbiased estimate of q.k (the estimator of RaBitQ, arXiv 2405.12497; with more bits, arXiv 2409.09913).
Balancing divides a key channel by ``sqrt(std(k) / rms(q))``, which minimises the error and makes it independent of the
scale of each channel; without it a few large channels would determine every bit.

Two bits are two planes of signs, of which the second counts half: levels -1.5, -0.5, 0.5 and 1.5. So codes of ``n``
bits are codes of one bit of a vector that is ``n`` times as long, and one scorer serves both. At head_dim 128, a block
of 32 tokens takes 1.06 times the bytes of min/max in bf16 with one bit, and 2.06 times with two. The error of an
estimate is half as large with two bits.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch

from scout_hf.selection.digest import Digest, register_digest, repeat_real
from scout_hf.stores.state import number_in, tensor_in

ROTATION_SEED = 0x5C0
CHUNK_TOKENS, FIT_TOKENS = 1024, 4096
# For keys without structure, the error of one bit per channel has 0.57 of the variance of q.k, and of two bits 0.13, so
# the best estimate of a product is 1 / 1.57 or 1 / 1.13 of the unbiased one; for structured keys it is larger.
SHRINKAGE = {1: 0.7, 2: 0.9}
# The distance between the levels of two bits that fits a normal distribution best, in standard deviations.
LEVEL_STEP = 0.9957
# Lower limits for channels with little variance, or small queries, in the sample: they may grow later and must not
# dominate then. Importance is the product of both, which does not depend on how a model scales its channels.
CONSTANT, UNIMPORTANT = 1e-4, 0.01
# The byte of a scale: 4 bits of exponent and 4 of mantissa, cut out of a float32 whose typical value is 1.
EXPONENT_BASE, KEPT_FROM = 120 << 23, 19
CONSTANTS = ("mean", "divisor", "scale", "factor", "rotation")


@register_digest
class SignCode(Digest):
    """Score of a block: the estimated log-sum-exp of its logits, base 2, of each query head.

    The code of a block is uint8: for each plane ``head_dim / 8`` rows of one byte per token, where bit ``i`` of row
    ``j`` is the sign of channel ``8 j + i``; then one byte per token with its scale. Padding is encoded as a real token
    of its block.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.selection import SignCode
    >>> digest, keys = SignCode(), torch.randn(1, 2, 3, 4, 8)
    >>> digest.fit(keys, None, None, 8**-0.5)
    >>> codes = digest.encode(keys, None)
    >>> digest.score(torch.randn(1, 4, 1, 8), codes).shape
    torch.Size([1, 4, 3])
    """

    name = "sign"
    native = "sign"
    needs_fit = True
    per_head = True
    bits = 1

    @classmethod
    def serves(cls, head_dim: int) -> bool:
        return head_dim % 8 == 0

    def code_bytes(self, block_size: int, head_dim: int) -> int:
        """Bytes of a block's code."""
        return block_size * (self.bits * head_dim // 8 + 1)

    def fit(
        self, keys: torch.Tensor, padding_mask: torch.Tensor | None, query_power: torch.Tensor | None, scale: float
    ) -> None:
        dim = keys.shape[-1]
        mean, spread = moments(keys, padding_mask)
        spread = _no_less(spread, CONSTANT)
        balance = spread
        if query_power is not None:
            power = _no_less(query_power.to(spread.device).sqrt(), CONSTANT)
            least = UNIMPORTANT * (spread * power).mean(-1, keepdim=True)
            balance = torch.maximum(spread, least / power)
            balance = (balance / torch.maximum(power, least / balance)).sqrt()
        # Normalised so that a typical scale is about 1.
        typical = (spread / balance).square().mean(-1, keepdim=True).sqrt()
        self.mean, self.divisor, self.scale = mean, balance * typical, scale
        self.factor = balance * typical * (scale * SHRINKAGE[self.bits] * math.log2(math.e))
        self.rotation = random_rotation(dim).to(spread.device)

    def load_state_dict(self, state: dict[str, Any], batch: int, device: torch.device) -> None:
        if state:
            mean = tensor_in(state, "mean", (batch, None, None), torch.float32)
            for name in ("divisor", "factor"):
                tensor_in(state, name, tuple(mean.shape), torch.float32)
            tensor_in(state, "rotation", (mean.shape[2],) * 2, torch.float32)
            number_in(state, "scale")
        super().load_state_dict({name: state[name] for name in CONSTANTS if name in state}, batch, device)

    def select_rows(self, rows: torch.Tensor) -> None:
        rows = rows.to(self.mean.device)
        self.mean, self.divisor, self.factor = self.mean[rows], self.divisor[rows], self.factor[rows]

    def encode(self, keys: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        batch, heads, blocks, size, dim = keys.shape
        if padding_mask is not None:
            keys = repeat_real(keys, padding_mask)
        rows = self.bits * dim // 8
        codes = torch.empty((batch, heads, blocks, size * (rows + 1)), dtype=torch.uint8, device=keys.device)
        step = max(1, CHUNK_TOKENS // size)
        for first in range(0, blocks, step):
            part = keys[:, :, first : first + step].flatten(2, 3).float()
            turned = ((part - self.mean[:, :, None]) / self.divisor[:, :, None]) @ self.rotation
            planes, scale = _quantise(turned, self.bits)
            into = codes[:, :, first : first + step]
            into[..., : size * rows] = _pack(planes, size)
            into[..., size * rows :] = scale_to_byte(scale).unflatten(2, (-1, size))
        return codes

    def centre(self, query: torch.Tensor) -> torch.Tensor | float:
        grouped = query.float().unflatten(1, (self.mean.shape[1], -1))
        return (grouped.squeeze(3) @ self.mean[..., None] * (self.scale * math.log2(math.e))).squeeze(-1).flatten(1)

    def prepare(self, query: torch.Tensor) -> torch.Tensor:
        """The query in the space of the codes, float32 (batch, query_heads, 1, bits * head_dim).

        Products are logits in base 2.
        """
        batch, heads, dim = self.factor.shape
        grouped = query.float().view(batch, heads, -1, dim) * self.factor[:, :, None]
        turned = (grouped @ self.rotation).view(query.shape)
        return turned if self.bits == 1 else torch.cat([turned * 0.5**plane for plane in range(self.bits)], dim=-1)

    def score(self, query: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        batch, heads, blocks, code = codes.shape
        rows = self.bits * query.shape[-1] // 8
        size = code // (rows + 1)
        turned = self.prepare(query).view(batch, heads, -1, 8 * rows).transpose(2, 3)
        scores = torch.empty((batch, heads, turned.shape[3], blocks), dtype=torch.float32, device=codes.device)
        step = max(1, CHUNK_TOKENS // size)
        for first in range(0, blocks, step):
            part = codes[:, :, first : first + step]
            signs = _unpack(part[..., : size * rows], size).flatten(2, 3)
            scale = byte_to_scale(part[..., size * rows :])
            # The sum over channels of +-q is twice the sum over those with bit 1, minus the sum over all.
            dots = (2 * torch.matmul(signs, turned) - turned.sum(2, keepdim=True)).unflatten(2, (-1, size))
            logits = dots * scale[..., None] * math.log(2)
            scores[..., first : first + step] = logits.logsumexp(3).transpose(2, 3) / math.log(2)
        return scores.flatten(1, 2)


@register_digest
class SignCode2(SignCode):
    """Two bits per channel and token; see :class:`SignCode`.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.selection import SignCode2
    >>> digest, keys = SignCode2(), torch.randn(1, 2, 3, 4, 8)
    >>> digest.fit(keys, None, None, 8**-0.5)
    >>> digest.encode(keys, None).shape
    torch.Size([1, 2, 3, 12])
    """

    name = "sign2"
    bits = 2


@functools.lru_cache
def random_rotation(dim: int) -> torch.Tensor:
    """A fixed random orthogonal matrix (dim, dim) of float32."""
    generator = torch.Generator("cpu").manual_seed(ROTATION_SEED + dim)
    return (
        torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator, device="cpu"))[0]
        .float()
        .contiguous()
    )


def moments(keys: torch.Tensor, padding_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of real tokens per row, KV head and channel, (batch, kv_heads, head_dim) of float32.

    For a long context, over a few thousand evenly spaced tokens.
    """
    found = []
    for row, tokens in enumerate(keys.flatten(2, 3)):
        real = torch.arange(tokens.shape[1], dtype=torch.int64, device=keys.device)
        if padding_mask is not None and bool(padding_mask[row].any()):
            real = real[padding_mask[row].flatten()]
        # One token that is not finite must not spoil all codes.
        some = tokens[:, real[:: max(1, len(real) // FIT_TOKENS)]].float().nan_to_num(0.0, 0.0, 0.0)
        found.append(torch.std_mean(some, dim=1, correction=0))
    spread, mean = (torch.stack(part) for part in zip(*found))
    return mean, spread


def scale_to_byte(scale: torch.Tensor) -> torch.Tensor:
    """Positive float32 to the nearest of 255 steps of about 3 to 6 %, between 2**-7 and 496, as uint8."""
    bits = (scale.nan_to_num(3e38).view(torch.int32) + (1 << (KEPT_FROM - 1))) - EXPONENT_BASE
    return (bits >> KEPT_FROM).clamp(1, 255).to(torch.uint8)


def byte_to_scale(byte: torch.Tensor) -> torch.Tensor:
    """Undo :func:`scale_to_byte`; float32."""
    return ((byte.to(torch.int32) << KEPT_FROM) + EXPONENT_BASE).view(torch.float32)


def _quantise(turned: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs (..., bits * dim) of bool and scales (...) of vectors (..., dim); the first plane is that of the signs."""
    square = turned.square().sum(-1)
    if bits == 1:
        return turned >= 0, square / turned.abs().sum(-1).clamp(min=1e-30)
    # Of the levels, half integers from -1.5 to 1.5, the nearest, as an integer that is 1.5 larger.
    step = LEVEL_STEP * (square[..., None] / turned.shape[-1]).sqrt().clamp(min=1e-30)
    level = (turned / step).nan_to_num(0.0).floor().clamp(-2, 1) + 2
    scale = square / (turned * (level - 1.5)).sum(-1).clamp(min=1e-30)
    return torch.cat([level >= 2, level.remainder(2) >= 1], dim=-1), scale


def _no_less(sizes: torch.Tensor, share: float) -> torch.Tensor:
    """Clamp the sizes of channels from below, to ``share`` of their mean."""
    return torch.maximum(sizes, share * sizes.mean(-1, keepdim=True)).clamp(min=1e-12)


def _pack(positive: torch.Tensor, size: int) -> torch.Tensor:
    """Bool (batch, heads, tokens, channels) to bytes (batch, heads, blocks, channels / 8 * size)."""
    if positive.device.type == "cpu":
        rows = torch.from_numpy(np.packbits(positive.numpy(), axis=-1, bitorder="little"))
    else:
        weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=positive.device)
        rows = (positive.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return rows.unflatten(2, (-1, size)).transpose(3, 4).flatten(3)


def _unpack(codes: torch.Tensor, size: int) -> torch.Tensor:
    """Bytes (batch, heads, blocks, channels / 8 * size) to 0 and 1, float32 (batch, heads, blocks, size, channels)."""
    bits = torch.arange(8, dtype=torch.uint8, device=codes.device)
    rows = codes.unflatten(3, (-1, size)).transpose(3, 4)
    return ((rows[..., None] >> bits) & 1).flatten(4).float()
