"""Masks that a model makes for itself and that are not causal and padding alone: images whose tokens see each other."""

from __future__ import annotations

from typing import Any

import torch

from scout_hf.errors import UnsupportedInputError, UnsupportedModelError
from scout_hf.step import Step


def is_special(step: Step, mask: Any) -> bool:
    """Whether the mask that a layer got is one to obey, not the causal one that every layer knows already."""
    return mask is not None and len(mask.shape) == 4 and not any(mask is plain for plain in step.plain_masks)


def for_prompt(mask: Any, name: str, query: torch.Tensor) -> torch.Tensor:
    """A special mask as attention of that name takes it, the model's own mask wherever it can be."""
    mask = _dense(mask)
    if name != "eager" or mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~mask, torch.finfo(query.dtype).min)


def allowed_by(step: Step, mask: Any) -> torch.Tensor:
    """Which tokens each query may see, (1 or batch, 1, 1 or queries, tokens) of bool.

    Raises
    ------
    UnsupportedModelError
        If the mask is of another size, differs by head, or is no mask but a bias on the scores.
    """
    mask = _dense(mask)
    _, heads, queries, tokens = mask.shape
    if heads != 1 or queries not in (1, step.queries) or tokens < step.tokens:
        raise UnsupportedModelError(
            f"a layer got a mask of shape {tuple(mask.shape)}, not (batch, 1, {step.queries}, {step.tokens}) for its "
            "queries and tokens, which a ScoutCache cannot serve; unpatch the model, or call it with a DynamicCache"
        )
    mask = mask[..., : step.tokens]
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if not bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise UnsupportedModelError(
            "a layer got a mask that adds numbers to the scores, a bias, which a ScoutCache cannot serve; unpatch the "
            "model, or call it with a DynamicCache"
        )
    return allowed


def refuse_unless_padding(step: Step, mask: Any) -> None:
    """Raise UnsupportedInputError if the newest token may not see all that is no padding."""
    allowed = allowed_by(step, mask)[:, 0, 0]
    expected = torch.ones_like(allowed) if step.mask is None else step.padding(allowed.device)
    if not bool((allowed == expected).all()):
        raise UnsupportedInputError(
            "this decode step wants a mask that hides tokens that are no padding, which a ScoutCache cannot serve; "
            "use a DynamicCache for this call, or unpatch the model"
        )
    step.plain_masks.append(mask)


def _dense(mask: Any) -> torch.Tensor:
    if isinstance(mask, torch.Tensor):
        return mask
    from torch.nn.attention.flex_attention import create_mask

    batch, heads, queries, tokens = mask.shape
    return create_mask(mask.mask_mod, batch, heads, queries, tokens, device=mask.kv_num_blocks.device)
