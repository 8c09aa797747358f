"""What a model with an indexer chose, as its attention calls say it."""

from __future__ import annotations

from typing import Any

import torch

from scout_hf.errors import UnsupportedInputError, UnsupportedModelError
from scout_hf.masks import allowed_by, is_special
from scout_hf.methods.base import Method
from scout_hf.selection.own_choice import ChoiceByMask, OwnChoice
from scout_hf.step import Step

BLOCKS, TOKENS = "block_indices", "indices"
"""Arguments of attention calls: numbers of the chosen blocks, or of the chosen tokens."""


def choice_of(
    step: Step, module: Any, method: Method, query: torch.Tensor, mask: Any, given: dict[str, Any]
) -> OwnChoice:
    """What a layer chose.

    Parameters
    ----------
    step : Step
    module : Module
    method : Method
    query : Tensor (batch, query_heads, queries, head_dim)
    mask : Tensor or None
        Of its attention call: without a choice beside it, it hides all but what was chosen.
    given : dict
        Further arguments of that call.

    Raises
    ------
    UnsupportedModelError
        If it does not say what it chose, or this cannot be followed.
    UnsupportedInputError
        For positions that begin anew within a row.
    """
    name, special = type(module).__name__, is_special(step, mask)
    blocks, tokens = given.get(BLOCKS), given.get(TOKENS)
    if blocks is not None and not special:
        if mask is None:
            _refuse_other_positions(step, given.get("position_ids"))
        choice = OwnChoice(blocks, module.indexer.block_size)
    elif tokens is not None and not special:
        choice = OwnChoice(tokens.unsqueeze(1), 1)
    elif special and blocks is None and tokens is None:
        choice = ChoiceByMask(allowed_by(step, mask, query.shape[2]))
    else:
        what = "a mask beside its choice" if special else "no choice, though its layer keeps keys of an indexer"
        raise UnsupportedModelError(
            f"{name} attends with {what}, which a ScoutCache does not support; unpatch the model, or report the family"
        )
    if method.kv_heads % choice.heads:
        raise UnsupportedModelError(
            f"{name} chose for {choice.heads} groups of heads, among which its {method.kv_heads} KV heads cannot be "
            "divided; unpatch the model, or report the family"
        )
    # A mask of numbers lowers all scores of padding alike; of one of bool, sdpa makes 0, as sinks do of both.
    numbers = blocks is not None or (mask is not None and mask.dtype != torch.bool)
    choice.mean_if_empty = numbers and given.get("s_aux") is None
    return choice


def _refuse_other_positions(step: Step, positions: torch.Tensor | None) -> None:
    """Raise UnsupportedInputError for positions, (1 or batch, queries), that are not the numbers of the tokens.

    Where stock's sdpa attention gets no mask, it hides tokens by them.
    """
    if positions is None or _refuse_other_positions in step.shared:
        return
    first = step.tokens - step.queries
    numbers = torch.arange(first, step.tokens, dtype=torch.int64, device=positions.device)
    if not bool((positions == numbers).all()):
        raise UnsupportedInputError(
            f"position_ids are not {first} to {step.tokens - 1}, the numbers of the tokens in their row, as where "
            "several sequences are packed into one; a ScoutCache follows an indexer that chooses blocks only with "
            "those. Give each sequence a row of its own, with an attention_mask for its padding, or use a DynamicCache"
        )
    step.shared[_refuse_other_positions] = True
