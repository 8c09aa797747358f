"""Numbers that change from step to step, on the device: what a captured step reads instead of host values."""

from __future__ import annotations

from typing import NamedTuple

import torch

SPARE_TOKENS = 1024
KNOWN_SHARES = 64


class Fill(NamedTuple):
    """A write-back by the device, of which the host may not know whether it was launched.

    word : Tensor (1,) of int64
        On the device: write-backs that have run.
    number : int
        The number of this one, from 1.
    """

    word: torch.Tensor
    number: int

    def has_run(self) -> bool:
        """Whether it has run, or will before anything that is launched from now on; waits for the device."""
        return int(self.word) >= self.number


class Clock:
    """Numbers on the device that a captured step reads instead of host values.

    Parameters
    ----------
    layers : int
    device : torch.device
    mask : Tensor (batch, tokens) of bool, or None
        Padding mask of the tokens so far, False for padding.

    Attributes
    ----------
    length, blocks : Tensor (1,) of int32
        Tokens per row with the new one; whole blocks on the host.
    shares : Tensor (layers,) of float32
        The CPU share at which a layer recalls.
    padding_mask, padding_mask_here : Tensor (batch, capacity) of bool, or None
        The padding mask with spare capacity for tokens to come, all True; and the same on the CPU.
    """

    def __init__(self, layers: int, device: torch.device, mask: torch.Tensor | None):
        self.length, self.blocks = torch.zeros((2, 1), dtype=torch.int32, device=device)
        self.shares = torch.zeros(layers, dtype=torch.float32, device=device)
        self._fills, self._fills_begun = torch.zeros(1, dtype=torch.int64, device=device), 0
        self._shares: dict[tuple[float, ...], torch.Tensor] = {}
        self.padding_mask: torch.Tensor | None = None
        self.padding_mask_here: torch.Tensor | None = None
        if mask is not None:
            capacity = mask.shape[1] + SPARE_TOKENS
            self.padding_mask = torch.ones((mask.shape[0], capacity), dtype=torch.bool, device=device)
            self.padding_mask[:, : mask.shape[1]] = mask
            self.padding_mask_here = self.padding_mask.cpu()
        self._block_masks: dict[tuple[int, int], torch.Tensor] = {}
        self._token_masks: dict[int, torch.Tensor] = {}

    def block_mask(self, block_size: int, blocks: int) -> torch.Tensor:
        """Blocks with at least one token that is no padding, (batch, blocks) of bool."""
        key = (block_size, blocks)
        if key not in self._block_masks:
            mask = self.padding_mask
            if mask is None:
                raise ValueError("no token of this step is padding")
            whole, known = mask.new_ones((len(mask), blocks * block_size)), min(blocks * block_size, mask.shape[1])
            whole[:, :known] = mask[:, :known]
            self._block_masks[key] = whole.unflatten(1, (blocks, block_size)).any(-1)
        return self._block_masks[key]

    def token_mask(self, block_size: int) -> torch.Tensor | None:
        """The padding mask of block ``blocks``, (batch, 1, block_size) of bool; None if no token is padding."""
        mask = self.padding_mask
        if mask is None:
            return None
        if block_size not in self._token_masks:
            places = torch.arange(block_size, dtype=torch.int64, device=mask.device) + self.blocks * block_size
            # A step whose tokens the mask does not cover is captured anew.
            self._token_masks[block_size] = mask.index_select(1, places.clamp(max=mask.shape[1] - 1))[:, None]
        return self._token_masks[block_size]

    def next_fill(self) -> Fill:
        """The next write-back, about to be launched."""
        self._fills_begun += 1
        return Fill(self._fills, self._fills_begun)

    def count_fill(self) -> None:
        """On the device, behind a write-back: it has run."""
        self._fills.add_(1)

    def set(self, tokens: int, blocks: int, shares: list[float]) -> None:
        """Set the numbers of the next step, in stream order."""
        self.length.fill_(tokens)
        self.blocks.fill_(blocks)
        # They alternate between few rows.
        key = tuple(shares)
        if key not in self._shares:
            if len(self._shares) == KNOWN_SHARES:
                self._shares.clear()
            here = torch.tensor(shares, dtype=torch.float32, device="cpu", pin_memory=self.shares.is_cuda)
            self._shares[key] = here.to(self.shares.device, non_blocking=True)
        self.shares.copy_(self._shares[key])
