"""Masks of models that are not just causal and padding, such as image tokens that attend to each other."""

from __future__ import annotations

from typing import Any

import torch

from scout_hf.errors import UnsupportedInputError, UnsupportedModelError
from scout_hf.step import Step


def is_special(step: Step, mask: Any) -> bool:
    """Whether the mask of a layer is more than the causal and padding mask of this pass."""
    return mask is not None and len(mask.shape) == 4 and not any(mask is plain for plain in step.plain_masks)


def for_prompt(mask: Any, name: str, query: torch.Tensor) -> torch.Tensor:
    """A special mask in the form that the attention implementation ``name`` takes."""
    mask = _dense(mask)
    if name != "eager" or mask.dtype != torch.bool:
        return mask
    return torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~mask, torch.finfo(query.dtype).min)


def allowed_by(step: Step, mask: Any, newest: int = 1) -> torch.Tensor:
    """Which tokens each of the ``newest`` queries may attend to, (1 or batch, 1, 1 or newest, tokens) of bool.

    Raises
    ------
    UnsupportedModelError
        If the mask has another size, differs by head, or is a bias on the scores.
    """
    mask = _dense(mask)
    _, heads, queries, tokens = mask.shape
    if heads != 1 or queries not in (1, newest) or tokens < step.tokens:
        raise UnsupportedModelError(
            f"a layer got a mask of shape {tuple(mask.shape)}, not (batch, 1, {newest}, {step.tokens}) for its "
            "queries and tokens, which a ScoutCache does not support; unpatch the model, or use a DynamicCache"
        )
    mask = mask[..., : step.tokens]
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    if not bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise UnsupportedModelError(
            "a layer got a mask that adds a bias to the scores, which a ScoutCache does not support; unpatch the "
            "model, or use a DynamicCache"
        )
    return allowed


def refuse_unless_padding(step: Step, mask: Any) -> None:
    """Raise UnsupportedInputError if the mask hides a token that is no padding from the newest token."""
    allowed = allowed_by(step, mask)[:, 0, 0]
    expected = torch.ones_like(allowed) if step.mask is None else step.padding(allowed.device)
    if not bool((allowed == expected).all()):
        raise UnsupportedInputError(
            "the mask of this decode step hides tokens that are no padding, which a ScoutCache does not support; use a "
            "DynamicCache for this call, or unpatch the model"
        )
    step.plain_masks.append(mask)


def _dense(mask: Any) -> torch.Tensor:
    if isinstance(mask, torch.Tensor):
        return mask
    from torch.nn.attention.flex_attention import create_mask

    batch, heads, queries, tokens = mask.shape
    return create_mask(mask.mask_mod, batch, heads, queries, tokens, device=mask.kv_num_blocks.device)
