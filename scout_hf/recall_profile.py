"""Recall intervals from a profile of the model on given prompts (ScoutAttention 3.4)."""

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
    """Decode from every prompt with recall off and find how long each layer stays under the threshold.

    A layer that is over it at once gets an interval of one step, the shortest there is.

    Parameters
    ----------
    handle : Handle
        Of a model patched with two tiers.
    prompts : sequence of Tensor (tokens,) or (1, tokens), or of lists of int
        Token ids without padding; long enough that not all blocks fit the budget. Their steps count in ``stats()``.
    steps : int
        Decode steps per prompt.
    threshold : float or None
        Highest CPU share allowed; by default the config's ``recall`` if it is a float, else 0.12.

    Raises
    ------
    ConfigError
        On one tier, where nothing is ever recalled, or for prompts that do not fit.
    """
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps={steps!r} is not allowed: a whole number of decode steps from 1 up, 48 by default")
    if handle.config.method != Scout.name:
        raise ConfigError(f"method={handle.config.method!r} has no recall intervals; patch with method='scout'")
    if not Scout.has_two_tiers(handle.config, handle.model.device):
        raise ConfigError("there is nothing to recall on one tier; patch with split='cpu', or move the model to a GPU")
    if threshold is None:
        threshold = handle.config.recall if isinstance(handle.config.recall, float) else DEFAULT_THRESHOLD
    if not isinstance(threshold, float) or not 0.0 < threshold <= 1.0:
        raise ConfigError(f"threshold={threshold!r} is not allowed: a float in (0, 1], 0.12 in the paper")
    histories = [_history(handle, ids, steps) for ids in _token_ids(prompts, handle.model.device)]
    depth = handle.model.config.get_text_config(decoder=True).num_hidden_layers
    mean = [_mean([history.get(layer, []) for history in histories]) for layer in range(depth)]
    if not any(ratio > 0 for layer in mean for ratio in layer):
        raise ConfigError(
            "the CPU had nothing to do on these prompts: all their blocks are resident; pass prompts longer than the "
            "budget, or patch with a smaller one"
        )
    return RecallIntervals(
        intervals=intervals_below(threshold, mean),
        threshold=threshold,
        model_type=handle.model.config.get_text_config(decoder=True).model_type,
        budget=handle.config.budget,
        block_size=handle.config.block_size,
    )


@contextmanager
def cpu_share_history(handle: Any) -> Iterator[dict[int, list[float]]]:
    """Within this, the share of chosen blocks that the CPU attended, by layer, one number per decode step."""
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
                f"a prompt is a {type(prompt).__name__}; pass token ids, such as tokenizer(text, return_tensors='pt')"
                ".input_ids"
            ) from error
        row = ids.dim() == 1 or (ids.dim() == 2 and ids.shape[0] == 1)
        if not row or not ids.numel() or ids.dtype not in WHOLE:
            raise ConfigError(
                f"a prompt has shape {tuple(ids.shape)} and dtype {ids.dtype}; pass each by itself, without padding, "
                "as whole numbers of shape (tokens,) or (1, tokens)"
            )
        found.append(ids.view(1, -1))
    return found


def _mean(runs: list[list[float]]) -> list[float]:
    length = min((len(run) for run in runs), default=0)
    return [sum(run[step] for run in runs) / len(runs) for step in range(length)]
