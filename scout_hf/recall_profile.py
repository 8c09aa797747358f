"""Profiles recall intervals of a model on prompts (ScoutAttention, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from scout_hf.compat.cache_names import CACHE
from scout_hf.errors import ConfigError
from scout_hf.methods import Scout
from scout_hf.recall_intervals import RecallIntervals, intervals_below

DEFAULT_THRESHOLD = 0.12
WHOLE = (torch.int64, torch.int32)


def profile_recall(handle: Any, prompts: Sequence[Any], steps: int, threshold: float | None) -> RecallIntervals:
    """Decode from every prompt without recall, and find for how many steps each layer stays under the threshold.

    A layer that exceeds it in the first step gets an interval of 1.

    Parameters
    ----------
    handle : Handle
        Of a model patched with two tiers.
    prompts : sequence of Tensor (tokens,) or (1, tokens), or of lists of int
        Token ids without padding, longer than the budget. Their decode steps count in ``stats()``.
    steps : int
        Decode steps per prompt.
    threshold : float or None
        Highest CPU share allowed; by default the config's ``recall`` if it is a float, else 0.12.

    Raises
    ------
    ConfigError
        On one tier, for another method than ``scout``, or for prompts that are no token ids or fit the budget.

    Examples
    --------
    >>> handle = scout_hf.patch(model, split="cpu", budget=64, block_size=16)
    >>> handle.profile_recall([ids], steps=8).intervals
    """
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps={steps!r} is not allowed: steps takes a whole number from 1 up; try 48")
    if handle.config.method != Scout.name:
        raise ConfigError(f"method={handle.config.method!r} has no recall intervals; patch with method='scout'")
    if not Scout.has_two_tiers(handle.config, handle.model.device):
        raise ConfigError("one tier has nothing to recall; patch with split='cpu', or move the model to a GPU")
    if handle._drafting is not None:
        raise ConfigError("with draft=... only drafts are sparse and recall; profile a patch without it")
    if threshold is None:
        threshold = handle.config.recall if isinstance(handle.config.recall, float) else DEFAULT_THRESHOLD
    if not isinstance(threshold, float) or not 0.0 < threshold <= 1.0:
        raise ConfigError(f"threshold={threshold!r} is not allowed: a float in (0, 1]; try 0.12, as in the paper")
    histories = [_history(handle, ids, steps) for ids in _token_ids(prompts, handle.model.device)]
    depth = handle.model.config.get_text_config(decoder=True).num_hidden_layers
    mean = [_mean([history.get(layer, []) for history in histories]) for layer in range(depth)]
    if not any(ratio > 0 for layer in mean for ratio in layer):
        raise ConfigError(
            "the CPU had nothing to attend on these prompts: all their blocks are resident; pass prompts longer than "
            "the budget, or patch with a smaller budget"
        )
    return RecallIntervals(
        intervals=intervals_below(threshold, mean),
        threshold=threshold,
        model_type=handle.model.config.get_text_config(decoder=True).model_type,
        budget=handle.config.sparse_budget,
        block_size=handle.config.block_size,
    )


@contextmanager
def cpu_share_history(handle: Any) -> Iterator[dict[int, list[float]]]:
    """Record the CPU's share of selected blocks in a ``with`` block.

    Parameters
    ----------
    handle : Handle
        Of a model patched with two tiers.

    Returns
    -------
    context manager of dict of int to list of float
        By layer, one number in [0, 1] per decode step; empty on one tier.

    Examples
    --------
    >>> with cpu_share_history(handle) as shares:
    ...     tokens = model.generate(**inputs, max_new_tokens=8)
    >>> len(shares[0])  # of layer 0
    7
    """
    counters = handle._hooks.counters
    history = counters.history = {}
    try:
        yield history
    finally:
        counters.history = None


def _history(handle: Any, ids: torch.Tensor, steps: int) -> dict[int, list[float]]:
    with cpu_share_history(handle) as history:
        handle.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE: handle.new_cache(recall=None)},
            max_new_tokens=steps + 1,
            min_new_tokens=steps + 1,
            do_sample=False,
        )
    return history


def _token_ids(prompts: Sequence[Any], device: torch.device) -> list[torch.Tensor]:
    if isinstance(prompts, (str, bytes)) or not len(prompts):
        raise ConfigError(
            "prompts takes a list of token id tensors, such as [tokenizer(text, return_tensors='pt').input_ids]"
        )
    found = []
    for prompt in prompts:
        try:
            ids = torch.as_tensor(prompt, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"a prompt is of type {type(prompt).__name__}; pass token ids, such as "
                "tokenizer(text, return_tensors='pt').input_ids"
            ) from error
        row = ids.dim() == 1 or (ids.dim() == 2 and ids.shape[0] == 1)
        if not row or not ids.numel() or ids.dtype not in WHOLE:
            raise ConfigError(
                f"a prompt has shape {tuple(ids.shape)} and dtype {ids.dtype}; pass each by itself, without padding, "
                "as integers of shape (tokens,) or (1, tokens)"
            )
        found.append(ids.view(1, -1))
    return found


def _mean(runs: list[list[float]]) -> list[float]:
    length = min((len(run) for run in runs), default=0)
    return [sum(run[step] for run in runs) / len(runs) for step in range(length)]
