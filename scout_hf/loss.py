"""What a sparse decode step lost, computed from one partial per block with the real query."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from scout_hf.fusion import Partial
from scout_hf.kernels.attend import attend

NAMES = (
    "samples",
    "mass",
    "output_error",
    "selection_error",
    "predicted_samples",
    "prediction_error",
    "recall_samples",
    "block_recall",
)
"""Names of the sums of :func:`lost`; a count comes before the sums that it divides."""


class Sample(NamedTuple):
    """All that is needed to measure one decode step of one layer for some KV heads; immutable.

    blocks : WholeBlocks
    heads : tuple of int
        The ``n`` KV heads to measure.
    query, out : Tensor (batch, n, group, head_dim)
        The real query, and the step's attention output before learnt sinks (gpt-oss).
    keys, values : Tensor (batch, n, tail, head_dim)
        Tokens after the whole blocks, always attended.
    attended : Tensor (batch, n, blocks) of bool
        Blocks that the step attended.
    padding_mask : Tensor (batch, tokens) of bool, or None
        False for padding.
    predicted : bool
        Whether some of the blocks were attended with a predicted query.
    scale, softcap
        As in :func:`scout_hf.kernels.attend.attend`.
    """

    blocks: Any
    heads: tuple[int, ...]
    query: torch.Tensor
    out: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    attended: torch.Tensor
    padding_mask: torch.Tensor | None
    predicted: bool
    scale: float
    softcap: float | None


def measure(sample: Sample, attend_each: Callable[..., Partial]) -> torch.Tensor:
    """Sums of :func:`lost` over rows and KV heads of a sample.

    ``attend_each(query, blocks, row, head, scale, softcap, padding_mask)`` gives a partial per whole block.
    """
    size, tokens = sample.blocks.block_size, sample.blocks.tokens
    rules, sums = (sample.scale, sample.softcap), []
    for row in range(len(sample.query)):
        padding_mask = past = None
        if sample.padding_mask is not None:
            past = sample.padding_mask[row, :tokens].view(-1, size)
            padding_mask = sample.padding_mask[row, tokens:]
        for at, head in enumerate(sample.heads):
            query = sample.query[row, at]
            parts = attend_each(query, sample.blocks, row, head, *rules, past)
            wide = parts.lse.dtype
            keys, values = (part[row, at].to(wide)[None, None] for part in (sample.keys, sample.values))
            allowed = None if padding_mask is None else padding_mask[None, None, None]
            tail = attend(query.to(wide)[None, :, None], keys, values, *rules, allowed)
            tail = Partial(tail.out[0, :, 0], tail.lse[0, :, 0].to(wide))
            out = sample.out[row, at].to(wide)
            sums.append(lost(parts, tail, sample.attended[row, at], out, sample.predicted))
    return torch.stack(sums).sum(0)


def lost(parts: Partial, tail: Partial, attended: torch.Tensor, out: torch.Tensor, predicted: bool) -> torch.Tensor:
    """What one KV head of one row lost in one decode step.

    Parameters
    ----------
    parts : Partial, out (blocks, group, head_dim) and lse (blocks, group)
        Attention of the real query over each whole block separately.
    tail : Partial, out (group, head_dim) and lse (group,)
        Attention over the tokens after them.
    attended : Tensor (blocks,) of bool
        Blocks that the step attended; the tail always is.
    out : Tensor (group, head_dim)
        The step's attention output.
    predicted : bool
        Whether some of the blocks were attended with a predicted query.

    Returns
    -------
    Tensor (len(NAMES),)
        Means over the GQA group, and counts: 1 where there was something to measure. Does not synchronise.
    """
    count = len(attended)
    lse = torch.cat([parts.lse, tail.lse[None]])
    total = lse.logsumexp(0)
    weights = (lse - total).exp()
    seen = torch.cat([attended, attended.new_ones(1)]).to(weights.dtype).unsqueeze(1) * weights
    mass = seen.sum(0)
    # Merge twice at once: over all blocks, and over the attended ones.
    both = torch.stack([weights, seen]).permute(2, 0, 1)
    outs = both[:, :, :count] @ parts.out.transpose(0, 1) + both[:, :, count:] * tail.out.unsqueeze(1)
    exact, same = outs.unbind(1)
    same = torch.where(mass > 0, 1 / mass, 0.0).unsqueeze(1) * same
    norm = exact.norm(dim=-1)

    def error(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.where(norm > 0, (one - other).norm(dim=-1) / norm, 0.0).mean()

    # By the sum of the group's masses, in log space: most masses underflow.
    best = (parts.lse - total).logsumexp(1).argsort(descending=True, stable=True)
    chosen = attended.sum()
    hits = (attended[best] & (torch.arange(count, dtype=torch.int64, device=best.device) < chosen)).sum()
    some, any_chosen = torch.isfinite(total).all(), chosen > 0
    one, none = mass.new_ones(()), mass.new_zeros(())
    found = [
        one,
        mass.mean(),
        error(out, exact),
        error(same, exact),
        one if predicted else none,
        error(out, same) if predicted else none,
        any_chosen.to(mass.dtype),
        torch.where(any_chosen, hits.to(mass.dtype) / chosen, none),
    ]
    return torch.where(some, torch.stack([part.to(mass.dtype) for part in found]), none)
