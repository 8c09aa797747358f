"""Layers whose model chooses by itself, with an indexer, which blocks or tokens it attends to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from scout_hf.config import ScoutConfig
from scout_hf.fusion import Partial, fuse
from scout_hf.kernels.attend import alike_where_empty, attend
from scout_hf.methods.base import Method
from scout_hf.step import Step
from scout_hf.stores import PagedKV, PagePool, make_store

PIECE_SCORES = 1 << 26
"""Scores of a piece of queries at once: 256 MiB of float32."""


class ChosenByModel(Method):
    """One tier of pages, of which the model's own choice is attended with the real query.

    Pages are in host memory, but for ``split="off"``, which keeps them on the model's device. There are no digests, and
    a budget has no meaning.

    Parameters
    ----------
    config, layer_idx, keys
        As for ``Method``.
    page : int
        Tokens of a page.
    """

    name = "scout"
    follows_choice = True
    kv: PagedKV

    def __init__(self, config: ScoutConfig, layer_idx: int, keys: torch.Tensor, page: int):
        super().__init__(config, layer_idx, keys)
        batch, heads, _, dim = keys.shape
        self.device = keys.device
        place = keys.device if config.split == "off" else torch.device("cpu")
        self.kv = make_store(batch, heads, dim, page, keys.dtype, place, config.host_dtype)

    def attend(self, step: Step, query: torch.Tensor) -> Partial:
        kv, choice = self.kv, step.choice
        assert choice is not None, "the attention function sets it"
        here = query.detach().to(kv.device)
        mask = None if step.mask is None else step.padding(kv.device)
        lists, seen = choice.lists(kv, mask)
        result = step.backend.attend_blocks(here, kv, lists, *self.scoring, seen)
        step.counters.attended(self.layer_idx, step.context(), result.tokens / (kv.batch * kv.heads))
        if self.config.split == "cpu" or query.device != kv.device:
            listed = lists.ids.numel() if lists.counts is None else int(lists.counts.sum())
            step.counters.cpu_share(self.layer_idx, listed, listed)
        partial = result.partial
        if mask is not None and choice.mean_if_empty:
            partial = self._with_empty_rows(step, here, partial)
        return Partial(*(part.to(query.device) for part in partial))

    def _with_empty_rows(self, step: Step, query: torch.Tensor, partial: Partial) -> Partial:
        """With the mean of all values for rows whose choice is padding alone, as masks of numbers give it."""
        empty = partial.lse == -torch.inf
        if not bool(empty.any()):
            return partial
        mean = step.backend.attend_blocks(torch.zeros_like(query), self.kv, None, *self.scoring).partial
        out = torch.where(empty.unsqueeze(-1), mean.out, partial.out)
        return Partial(out, torch.where(empty, mean.lse, partial.lse))

    def attend_many(self, step: Step, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Partial:
        """As of ``Method``, but each query attends to its own choice; for a first prompt too, with any keys of it."""
        choice, queries = step.choice, query.shape[2]
        assert choice is not None, "the attention function sets it"
        past, tokens = self.kv.length - queries, self.kv.length
        padding = None if step.mask is None else step.padding(query.device)[:, None, None]
        order = torch.arange(tokens, dtype=torch.int64, device=query.device)
        size = max(1, PIECE_SCORES // (query.shape[0] * query.shape[1] * tokens))
        parts = []
        for first in range(0, queries, size):
            last = min(first + size, queries)
            allowed = choice.tokens(first, last, tokens) & (order <= order[past + first : past + last, None])
            if padding is not None:
                allowed = allowed & padding
            if 1 < allowed.shape[1] < keys.shape[1]:
                allowed = allowed.repeat_interleave(keys.shape[1] // allowed.shape[1], dim=1)
            piece = query[:, :, first:last]
            if choice.mean_if_empty:
                piece, allowed = alike_where_empty(piece, allowed)
            seen = [attend(piece, keys, values, *self.scoring, allowed[..., past:])]
            for at, *held in self.past_chunks(step, past):
                old_keys, old_values = (part.to(query.device) for part in held)
                those = allowed[..., at : at + old_keys.shape[2]]
                seen.append(attend(piece, old_keys, old_values, *self.scoring, those))
            parts.append(fuse(seen))
        step.counters.exact(self.layer_idx, tokens)
        return Partial(*(torch.cat(each, dim=2) for each in zip(*parts)))

    def read_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().read_all()
        return keys.to(self.device), values.to(self.device)

    def pools(self) -> Sequence[PagePool]:
        return [self.kv.table.pool]

    def tier_bytes(self) -> dict[str, int]:
        return {"host" if self.kv.device.type == "cpu" else "device": self.kv.used_bytes}
