"""A first, coarse score: two tokens stand for a block, and only the best blocks by these are scored token by token.

One token is the mean of all tokens of the block but one; the other is that one, the farthest from the mean. A block may
matter because of a single token, and that one is mostly far from the others. Both are encoded as tokens are, which
takes a sixteenth of the bytes at 32 tokens per block.
"""

from __future__ import annotations

import torch

from scout_hf.kernels.cpu import GROUP, Coarse
from scout_hf.kernels.cpu.library import load_library
from scout_hf.selection.digest import Digest, repeat_real
from scout_hf.selection.sign import CHUNK_TOKENS, SignCode

TOKENS = 2
"""That stand for a block."""

LEAST_BLOCK = 16
"""Tokens of blocks from which on two are much less."""

FINE, WORTH = 6, 2
"""Blocks that are scored token by token, for each that is chosen; and candidates for each of those, at least."""


def own_code(digest: Digest, block_size: int, keys: torch.Tensor) -> int | None:
    """Numbers of a block's code; None if blocks with such keys and digest cannot be scored coarsely first."""
    if not isinstance(digest, SignCode) or keys.device.type != "cpu" or block_size < LEAST_BLOCK:
        return None
    library = load_library()
    return None if library is None or library.isa == "base" else digest.code_bytes(block_size, keys.shape[-1])


def summaries(keys: torch.Tensor, padding_mask: torch.Tensor | None, power: torch.Tensor | None) -> torch.Tensor:
    """The two tokens of each block, float32 (batch, kv_heads, blocks, 2, head_dim).

    Parameters
    ----------
    keys : Tensor (batch, kv_heads, blocks, block_size, head_dim)
    padding_mask : Tensor (batch, blocks, block_size) of bool, or None
    power : Tensor (batch, kv_heads, head_dim), or None
        Mean square of the queries per channel; None to weigh all channels alike.
    """
    batch, heads, blocks, size, dim = keys.shape
    if padding_mask is not None:
        keys = repeat_real(keys, padding_mask)
    two = torch.empty((batch, heads, blocks, TOKENS, dim), dtype=torch.float32, device=keys.device)
    step = max(1, CHUNK_TOKENS // size)
    for first in range(0, blocks, step):
        part = keys[:, :, first : first + step].float()
        away = (part - part.mean(3, keepdim=True)).square_()
        distance = away.sum(-1) if power is None else (away @ power[:, :, None, :, None].to(away.device)).squeeze(-1)
        place = distance.argmax(-1)[..., None, None].expand(*part.shape[:3], 1, dim)
        farthest = part.gather(3, place)
        two[:, :, first : first + step, 1:] = farthest
        two[:, :, first : first + step, :1] = (part.sum(3, keepdim=True) - farthest) / (size - 1)
    return two


def fitting(codes: torch.Tensor, own: int, block_size: int, wanted: bool) -> tuple[torch.Tensor, int]:
    """Saved codes, without summaries that are not wanted, and the numbers per block that they must have."""
    if codes.shape[3] != own + own // block_size * TOKENS:
        return codes, own
    return (codes, codes.shape[3]) if wanted else (codes[..., :own], own)


class CoarseCodes:
    """The codes of summaries in the order in which the native library reads them, made when they are wanted.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.selection.coarse import CoarseCodes
    >>> CoarseCodes().choice(torch.zeros(1, 2, 40, 10, dtype=torch.uint8), count=5).codes.shape
    torch.Size([1, 2, 3, 160])
    """

    def __init__(self) -> None:
        self._groups = torch.empty((0, 0, 0, 0, 0, 0), dtype=torch.uint8, device="cpu")
        self._blocks = 0

    def choice(self, codes: torch.Tensor | None, count: int) -> Coarse | None:
        """Coarse codes of all blocks, to choose ``count`` of them; None if there are none, or they do not pay.

        Parameters
        ----------
        codes : Tensor (batch, kv_heads, blocks, code), or None
            Of the summaries; unchanged up to the blocks of the last call, unless :meth:`crop` was called since.
        count : int
        """
        fine = FINE * count
        if codes is None or codes.shape[2] < WORTH * fine:
            return None
        blocks = codes.shape[2]
        if blocks != self._blocks:
            self._group(codes)
        return Coarse(self._groups[:, :, : -(-blocks // GROUP)].flatten(3), fine)

    @property
    def used_bytes(self) -> int:
        """Bytes of the codes, spare capacity included."""
        return self._groups.nbytes

    def _group(self, codes: torch.Tensor) -> None:
        batch, heads, blocks, code = codes.shape
        # After a crop of no more than a window there may be fewer than before, all of them known.
        groups, first = -(-blocks // GROUP), min(self._blocks, blocks) // GROUP
        if groups > self._groups.shape[2]:
            # Of every group: a byte of a row of signs, or of the scales, for both tokens of each block.
            grown = codes.new_zeros((batch, heads, groups + groups // 8 + 2, code // TOKENS, GROUP, TOKENS))
            if first:
                grown[:, :, :first] = self._groups[:, :, :first]
            self._groups = grown
        new = codes[:, :, first * GROUP :].unflatten(3, (-1, TOKENS)).transpose(2, 3)
        whole = blocks // GROUP
        if whole > first:
            them = new[:, :, :, : (whole - first) * GROUP].unflatten(3, (-1, GROUP))
            self._groups[:, :, first:whole] = them.transpose(2, 3)
        if whole < groups:
            self._groups[:, :, whole, :, : blocks % GROUP] = new[:, :, :, (whole - first) * GROUP :]
        self._blocks = blocks

    def crop(self, blocks: int) -> None:
        """Forget all from block ``blocks`` on."""
        self._blocks = min(self._blocks, blocks)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``."""
        if self._groups.numel():
            self._groups = self._groups[rows.to(self._groups.device)]

    def fork(self) -> CoarseCodes:
        """An independent copy."""
        twin = CoarseCodes()
        twin._groups, twin._blocks = self._groups.clone(), self._blocks
        return twin
