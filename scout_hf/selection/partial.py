"""A few directions that tell which keys a query will attend to: partial queries and keys (InfiniGen, 2406.19707)."""

from __future__ import annotations

import torch

from scout_hf.errors import CacheStateError

# The papers' models have 128 channels, of which a fifth are 26; of 32 channels 6 are too few to rank by.
FEWEST = 16
UNKNOWN = "no directions are known: call learn() first, then extend()"


class PartialKeys:
    """Keys in the directions that the prompt's queries point to most, for tokens ``[0, length)``.

    InfiniGen skews query and key weights offline by a singular value decomposition, then keeps the channels with the
    largest queries. Rotary embeddings come between weights and scores, and no rotation of the weights passes through
    them; so the directions are taken after them, per row and KV head, from the queries of the prompt itself.

    Parameters
    ----------
    ratio : float
        Share of the channels that is kept, 16 of them at least.
    """

    def __init__(self, ratio: float):
        self.ratio, self.length = ratio, 0
        self._basis: torch.Tensor | None = None
        self._keys: torch.Tensor | None = None

    @property
    def known(self) -> bool:
        """Whether directions have been chosen."""
        return self._basis is not None

    @property
    def used_bytes(self) -> int:
        """Bytes of keys and directions."""
        return sum(part.numel() * part.element_size() for part in (self._basis, self._keys) if part is not None)

    def learn(self, vectors: torch.Tensor) -> None:
        """Choose the directions from queries, or keys, (batch, kv_heads, n, head_dim); zeros tell nothing."""
        wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        channels = wide.shape[-1]
        kept = min(channels, max(FEWEST, round(self.ratio * channels)))
        # Of the Gram matrix the largest eigenvalues come last.
        self._basis = torch.linalg.eigh(wide.transpose(-1, -2) @ wide).eigenvectors[..., channels - kept :]

    def extend(self, keys: torch.Tensor) -> None:
        """Add the next tokens' keys, (batch, kv_heads, tokens, head_dim)."""
        tokens, basis = keys.shape[2], self._basis
        if basis is None:
            raise CacheStateError(UNKNOWN)
        if self._keys is None or self.length + tokens > self._keys.shape[2]:
            capacity = self.length + tokens + max(256, (self.length + tokens) // 8)
            grown = keys.new_empty((*keys.shape[:2], capacity, basis.shape[-1]))
            if self._keys is not None:
                grown[:, :, : self.length] = self._keys[:, :, : self.length]
            self._keys = grown
        self._keys[:, :, self.length : self.length + tokens] = (keys.to(basis.dtype) @ basis).to(keys.dtype)
        self.length += tokens

    def scores(self, query: torch.Tensor) -> torch.Tensor:
        """Approximate q.k of queries (batch, query_heads, 1, head_dim): (batch, kv_heads, group, length)."""
        basis, keys = self._basis, self._keys
        if basis is None or keys is None:
            raise CacheStateError(UNKNOWN)
        batch, _, _, dim = query.shape
        grouped = query.reshape(batch, basis.shape[1], -1, dim).to(basis.dtype) @ basis
        keys = keys[:, :, : self.length]
        return (grouped.to(keys.dtype) @ keys.transpose(-1, -2)).to(basis.dtype)

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""
        self.length = min(self.length, length)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row ``i`` what row ``rows[i]`` was."""
        if self._basis is not None:
            rows = rows.to(self._basis.device)
            self._basis = self._basis[rows]
            self._keys = None if self._keys is None else self._keys[rows]

    def fork(self) -> PartialKeys:
        """An independent copy."""
        twin = PartialKeys(self.ratio)
        twin.__dict__.update(self.__dict__, _keys=None if self._keys is None else self._keys.clone())
        return twin
