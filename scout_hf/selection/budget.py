"""How many blocks the budget allows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from scout_hf.config import ScoutConfig

if TYPE_CHECKING:
    from scout_hf.step import Step


def budgeted(config: ScoutConfig, step: Step, blocks: int) -> int | torch.Tensor:
    """Blocks to choose of the first ``blocks``, for all rows or for each; there may be fewer."""
    budget = config.sparse_budget
    # Whole blocks of the window, which are always attended; after a crop there may be fewer than configured.
    recent = min(config.blocks(config.window), max(0, step.tokens // config.block_size - blocks))
    if isinstance(budget, int):
        return max(1, config.blocks(budget) - recent)
    part = 1.0 if budget is None else budget
    if step.mask is None:
        return max(1, config.blocks(math.ceil(part * step.tokens)) - recent)
    share = torch.ceil(torch.ceil(part * step.row_tokens().double()) / config.block_size).long()
    return (share - recent).clamp(min=1)
