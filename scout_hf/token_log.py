"""Which token ids a cache holds, so that a session knows its text and its prefixes can be found again."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

PLAIN = frozenset(
    {
        "input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "cache_position", "use_cache",
        "logits_to_keep", "num_logits_to_keep", "return_dict", "labels", "output_hidden_states", "output_attentions",
        "output_router_logits", "num_items_in_batch", "tokenizer", "assistant_tokenizer",
    }
)  # fmt: skip
"""Arguments of a forward pass that change neither keys nor values, or are looked at here."""

MERGE_EVERY = 256


class Held(NamedTuple):
    """What a cache holds, row by row.

    ids : Tensor (batch, tokens) of int64, on the CPU
    mask : Tensor (batch, tokens) of bool, on the CPU, or None
        False for padding.
    exact : int
        Leading tokens whose keys and values are exact: no sparse step came before.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    exact: int


class TokenLog:
    """The token ids of a cache, if they are known: not after embeddings, images, or positions of the caller's own.

    Passes add to it. It notices by itself that a pass was rolled back, or that the cache was changed behind its back:
    each entry goes with the number of changes that the cache has counted.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Know nothing, until a pass begins with an empty cache."""
        self._parts: list[torch.Tensor] = []
        self._mask: torch.Tensor | None = None
        self._length = self._exact = self._changes = 0

    def add(self, given: dict[str, Any], past: int, exact: bool, changes: int) -> None:
        """A pass begins.

        Parameters
        ----------
        given : dict
            Arguments of the pass.
        past : int
            Tokens in the cache before it.
        exact : bool
            Whether it attends to all tokens with the real queries.
        changes : int
            How many changes the cache will have counted with this pass.
        """
        if past == 0:
            self.forget()
        elif self._changes != changes - 1 or self._length < past:
            return self.forget()
        else:
            self._cut(past)
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None or not is_plain(given) or not _has_plain_positions(given, past):
            return self.forget()
        # A copy: loops of users may write the next ids into the same tensor.
        self._parts.append(ids.detach().clone())
        if len(self._parts) >= MERGE_EVERY and ids.shape[1] == 1:
            self._parts = [torch.cat(self._parts, dim=1)]
        if exact and self._exact == past:
            self._exact += ids.shape[1]
        self._length, self._mask, self._changes = past + ids.shape[1], mask, changes

    def cropped(self, length: int, changes: int) -> None:
        """The cache was cropped to ``length``, which is the change number ``changes``."""
        if self._in_step(changes):
            self._cut(length)

    def selected(self, rows: torch.Tensor | int, changes: int) -> None:
        """Row ``i`` of the cache was replaced by its row ``rows[i]``, which is the change number ``changes``.

        A number: each row is repeated so often.
        """
        if self._in_step(changes):
            if isinstance(rows, int):
                rows = torch.arange(len(self._parts[0]), dtype=torch.int64, device="cpu").repeat_interleave(rows)
            self._parts = [part[rows.to(part.device)] for part in self._parts]
            self._mask = None if self._mask is None else self._mask[rows.to(self._mask.device)]

    def take(self, held: Held, changes: int) -> None:
        """Know this, of a cache that was just filled."""
        self.forget()
        self._parts, self._mask = [held.ids], held.mask
        self._length, self._exact, self._changes = held.ids.shape[1], held.exact, changes

    def held(self, length: int, changes: int) -> Held | None:
        """What is known of a cache with ``length`` tokens that has counted ``changes``; None if it is not all known."""
        if not self._parts or self._changes != changes or self._length < length:
            return None
        self._cut(length)
        if not self._parts:
            return None
        self._parts = [torch.cat(self._parts, dim=1)] if len(self._parts) > 1 else self._parts
        ids = self._parts[0].cpu().to(torch.int64)
        mask = None if self._mask is None else self._mask[:, :length].cpu().bool()
        return Held(ids, None if mask is None or bool(mask.all()) else mask, self._exact)

    def fork(self, changes: int, twin_changes: int) -> TokenLog:
        """A copy for a twin of the cache, whose changes are counted anew."""
        twin = copy.copy(self)
        twin._parts = list(self._parts)
        if self._changes == changes:
            twin._changes = twin_changes
        else:
            twin.forget()
        return twin

    def _in_step(self, changes: int) -> bool:
        if self._changes == changes - 1 and self._parts:
            self._changes = changes
            return True
        self.forget()
        return False

    def _cut(self, length: int) -> None:
        while self._length > length:
            last = self._parts[-1]
            keep = last.shape[1] - (self._length - length)
            if keep > 0:
                self._parts[-1], self._length = last[:, :keep], length
            else:
                self._parts.pop()
                self._length -= last.shape[1]
        self._exact = min(self._exact, length)
        if not length:
            self.forget()


def is_plain(given: dict[str, Any]) -> bool:
    """Whether keys and values of a pass with these arguments follow from token ids, positions and padding alone."""
    ids = given.get("input_ids")
    return ids is not None and ids.dim() == 2 and not any(given[name] is not None for name in given.keys() - PLAIN)


def _has_plain_positions(given: dict[str, Any], past: int) -> bool:
    positions, queries = given.get("position_ids"), given["input_ids"].shape[1]
    if positions is None or (queries == 1 and past):  # a decode step of a loop that began plainly
        return True
    if positions.dim() != 2 or positions.shape[1] != queries:
        return False
    return has_plain_positions(positions, given.get("attention_mask"), past)


def has_plain_positions(positions: torch.Tensor, mask: torch.Tensor | None, past: int) -> bool:
    """Whether new tokens have the positions that ``generate()`` gives them: their number among the real tokens.

    Parameters
    ----------
    positions : Tensor (1 or batch, queries)
    mask : Tensor (batch, tokens) or None
        The padding mask of all tokens, those in the cache included.
    past : int
        Tokens in the cache.
    """
    queries = positions.shape[1]
    if mask is None:
        expected = torch.arange(past, past + queries, dtype=torch.int64, device=positions.device)
        return bool((positions == expected).all())
    mask = mask.to(positions.device).bool()
    same = positions == (mask.long().cumsum(-1) - 1)[:, -queries:]
    return bool((same | ~mask[:, -queries:]).all())
