"""Passes of several new tokens over cached ones: exact attention over the past, and of the new ones over each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from scout_hf.fusion import Partial
from scout_hf.kernels.attend import attend
from scout_hf.step import Step

if TYPE_CHECKING:
    from scout_hf.methods.base import Method


def attend_past(method: Method, step: Step, query: torch.Tensor, past: int) -> list[Partial]:
    """Attention over the first ``past`` tokens, in parts: in place where the backend can, else chunk by chunk."""
    if past and step.allowed is None and (served := _in_place(method, step, query, past)) is not None:
        return served
    parts = []
    for start, keys, values in method.past_chunks(step, past):
        stop = start + keys.shape[2]
        allowed = _padding(step, query, start, stop) if step.allowed is None else step.allowed[..., start:stop]
        parts.append(attend(query, keys, values, *method.scoring, allowed))
    return parts


def attend_new(method: Method, step: Step, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Partial:
    """Attention of the new tokens over each other; parameters as of ``Method.attend_many``."""
    queries = query.shape[2]
    past = method.length - queries
    if step.allowed is not None:
        return attend(query, keys, values, *method.scoring, step.allowed[..., past:])
    new = _padding(step, query, past)
    if new is None or bool(new.all()):
        return attend(query, keys, values, *method.scoring, causal=True)
    order = torch.arange(queries, dtype=torch.int64, device=query.device)
    return attend(query, keys, values, *method.scoring, new & (order[:, None] >= order[None, :]))


def _in_place(method: Method, step: Step, query: torch.Tensor, past: int) -> list[Partial] | None:
    """Attention over the pages without a copy, then over the past that is not in them; None if that is not possible."""
    pages = method.past_pages(step)
    if pages is None or not pages.length:
        return None
    here = min(past, pages.length)
    mask = None if step.mask is None else step.padding(pages.device)
    part = step.backend.attend_past(query, pages, here, *method.scoring, mask)
    if part is None:
        return None
    if here == past:
        return [part]
    rest = attend(query, *method.kv.read(here, past), *method.scoring, _padding(step, query, here, past))
    return [part, rest]


def _padding(step: Step, query: torch.Tensor, start: int, stop: int | None = None) -> torch.Tensor | None:
    """The padding mask of tokens ``start:stop``, (batch, 1, 1, tokens); None without padding."""
    return None if step.mask is None else step.padding(query.device)[:, None, None, start:stop]
