"""A model of an unknown family is tried once, on a few tokens, before patch() returns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from scout_hf.cache_names import CACHE
from scout_hf.errors import ScoutError, UnsupportedModelError
from scout_hf.patches import ProbeFamily

TOKENS = 6
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def check_unknown_family(model: Any, family: Any, handle: Any, foreign: bool) -> None:
    """Compare patched with stock logits on a short prompt and one decode step; known families pass unseen.

    Not where code that is not of transformers attends (``foreign``), whatever the family is called.

    Raises
    ------
    UnsupportedModelError
        If the model cannot run with a ScoutCache, or answers differently.
    """
    if not isinstance(family, ProbeFamily) and not foreign:
        return
    ids = torch.arange(1, TOKENS + 1, dtype=torch.int64, device=model.device).unsqueeze(0)
    ids = ids % model.config.get_text_config().vocab_size
    name = type(model).__name__
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _without_grids(model):
            cache = handle.new_cache(budget=None, layer_ahead=False)
            first = model(input_ids=ids[:, :-1], **{CACHE: cache}, use_cache=True).logits[:, -1]
            second = model(input_ids=ids[:, -1:], **{CACHE: cache}, use_cache=True).logits[:, -1]
            stock = model(input_ids=ids, use_cache=False).logits
    except ScoutError as error:
        raise UnsupportedModelError(f"{name} is of an unknown family and cannot be served: {error}") from error
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} is of an unknown family and its trial run failed ({type(error).__name__}: {error}); add "
            "it with scout_hf.patches.register_family, or use it unpatched"
        ) from error
    finally:
        model.train(was_training)
        handle.reset_stats()
    expected = torch.stack([stock[:, -2], stock[:, -1]]).float()
    error = (torch.stack([first, second]).float() - expected).abs().max().item()
    allowed = TOLERANCE.get(stock.dtype, 1e-1) * max(1.0, expected.abs().max().item())
    if not error <= allowed:
        raise UnsupportedModelError(
            f"{name} is of an unknown family and its patched logits differ by {error:.2g} (allowed {allowed:.2g}): its "
            "attention does something that scout_hf cannot follow; use it unpatched"
        )


@contextlib.contextmanager
def _without_grids(model: Any) -> Iterator[None]:
    """Models that count positions by image keep the shift of their last prompt; the trial has none and leaves it."""
    kept = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in module.__dict__]
    try:
        for module, _ in kept:
            module.rope_deltas = None
        yield
    finally:
        for module, shift in kept:
            module.rope_deltas = shift
