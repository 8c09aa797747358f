"""Retained single tokens of every row and KV head, copied into pages of their own, so the CPU reads only those."""

from __future__ import annotations

from typing import Any

import torch

from scout_hf.stores.packed import make_store
from scout_hf.stores.state import State, ids_in, state_in, tensor_in


class RetainedTokens:
    """Keys and values of the tokens that each KV head retains; every (row, head) pair is one row of a paged store.

    Parameters
    ----------
    batch, heads, head_dim, block_size : int
        Rows, KV heads, channels per head, tokens per page.
    dtype : torch.dtype

    Attributes
    ----------
    kv : PagedKV
        ``batch * heads`` rows of one head, all of one length; shorter ones are filled up with invalid entries.
    valid : Tensor (batch * heads, length) of bool
        False for filler and for dropped entries.
    tokens, weights : Tensor (batch * heads, length)
        Position of each entry, and the attention weight for which it was retained.
    total : int
        Valid entries over all rows and heads.
    """

    def __init__(self, batch: int, heads: int, head_dim: int, block_size: int, dtype: torch.dtype):
        self.heads = heads
        self.kv = make_store(batch * heads, 1, head_dim, block_size, dtype, "cpu")
        self.tokens = torch.zeros((batch * heads, 0), dtype=torch.int64, device="cpu")
        self.weights = torch.zeros((batch * heads, 0), dtype=torch.float32, device="cpu")
        self.valid = torch.zeros((batch * heads, 0), dtype=torch.bool, device="cpu")
        self.total = 0

    def counts(self) -> torch.Tensor:
        """Valid entries of each row and head, (batch * heads,)."""
        return self.valid.sum(-1)

    def add(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: torch.Tensor,
        weights: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        """Retain the ``valid`` ones of further tokens.

        Parameters
        ----------
        keys, values : Tensor (batch, heads, n, head_dim)
        tokens : Tensor of int64, broadcastable to (batch, heads, n)
            Positions.
        weights : Tensor (batch, heads, n)
        valid : Tensor (batch, heads, n) of bool
            Which of them to retain.
        """
        most = int(valid.sum(-1).max()) if valid.numel() else 0
        if not most:
            return
        # Valid entries first, in order.
        order = valid.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
        parts = [part.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, part.shape[-1])) for part in (keys, values)]
        self.kv.append(*(part.flatten(0, 1).unsqueeze(1) for part in parts))
        for name, new in (("tokens", tokens), ("weights", weights), ("valid", valid)):
            held = getattr(self, name)
            new = new.expand(valid.shape).gather(2, order).flatten(0, 1).to(held.dtype)
            setattr(self, name, torch.cat([held, new], dim=1))
        self.total += int(valid.sum())

    def limit(self, most: torch.Tensor) -> None:
        """Drop the entries of lowest weight where a head holds more than ``most`` (batch,) of its row."""
        over = self.counts() > (allowed := most.repeat_interleave(self.heads))
        if bool(over.any()):
            rank = self.weights.masked_fill(~self.valid, -1.0).argsort(dim=-1, descending=True, stable=True).argsort(-1)
            self.valid = self.valid & (rank < allowed[:, None])
            self._compact()

    def crop(self, length: int) -> None:
        """Drop the tokens from ``length`` on."""
        self.valid = self.valid & (self.tokens < length)
        # Invalid entries are used as indices too: they must stay in range.
        self.tokens = self.tokens.masked_fill(~self.valid, 0)
        self._compact()

    def mark(self) -> tuple[Any, ...]:
        """The current state for ``rollback``, by reference (no copies)."""
        return self.kv, self.kv.length, self.tokens, self.weights, self.valid, self.total

    def rollback(self, mark: tuple[Any, ...]) -> None:
        """Restore the state of ``mark``, also after an interrupted ``add``."""
        self.kv, length, self.tokens, self.weights, self.valid, self.total = mark
        self.kv.crop(length)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``."""
        rows = (rows.cpu()[:, None] * self.heads + torch.arange(self.heads, dtype=torch.int64, device="cpu")).flatten()
        self.kv.select_rows(rows)
        self.tokens, self.weights, self.valid = self.tokens[rows], self.weights[rows], self.valid[rows]
        self.total = int(self.valid.sum())

    def fork(self) -> RetainedTokens:
        """An independent copy that shares pages, copy on write."""
        twin = object.__new__(RetainedTokens)
        twin.__dict__.update(self.__dict__, kv=self.kv.fork())
        return twin

    def state_dict(self) -> State:
        """All entries, as views that are valid until the next change."""
        names = ("tokens", "weights", "valid")
        return {"kv": self.kv.state_dict()} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: State, tokens: int) -> None:
        """Take what :meth:`state_dict` gave, of a context of ``tokens``; SessionError if it does not fit."""
        kv = make_store(self.kv.batch, 1, self.kv.head_dim, self.kv.block_size, self.kv.dtype, "cpu")
        kv.load_state_dict(state_in(state, "kv"))
        shape = (kv.batch, kv.length)
        places = ids_in(state, "tokens", shape, 0, max(1, tokens))
        weights, valid = tensor_in(state, "weights", shape), tensor_in(state, "valid", shape, torch.bool)
        self.kv, self.tokens, self.weights, self.valid = kv, places.clone(), weights.clone(), valid.clone()
        self.total = int(valid.sum())

    def _compact(self) -> None:
        """After a drop: copy the valid entries into a new store if most entries are invalid."""
        self.total = int(self.valid.sum())
        left, length = int(self.counts().max()) if len(self.valid) else 0, self.valid.shape[1]
        if length <= 2 * left + self.kv.block_size:
            return
        order = self.valid.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :left]
        # A new store: ``rollback`` may need the current one.
        kv = make_store(self.kv.batch, 1, self.kv.head_dim, self.kv.block_size, self.kv.dtype, "cpu")
        where = order[:, None, :, None].expand(-1, 1, -1, kv.head_dim)
        if left:
            kv.append(*(part.gather(2, where) for part in self.kv.read(0, length)))
        self.kv = kv
        self.tokens, self.weights, self.valid = (
            part.gather(1, order) for part in (self.tokens, self.weights, self.valid)
        )
