"""Partial keys: scores from a few directions of the head dimension (InfiniGen, arXiv 2406.19707, section 4)."""

from __future__ import annotations

import torch

from scout_hf.errors import CacheStateError, SessionError
from scout_hf.stores.state import State, maybe_tensor_in

# The paper's models keep a fifth of 128 channels, which is 26; a fifth of 32 channels would be too few to rank by.
FEWEST = 16
UNKNOWN = "no directions have been learned: call learn() first, then extend()"


class PartialKeys:
    """Keys of tokens ``[0, length)``, projected onto the principal directions of the prompt's queries.

    InfiniGen rotates query and key weights offline by a singular value decomposition, then keeps the channels with the
    largest queries. With rotary embeddings, which are applied after the weights, that is not possible. So the
    directions are computed after the rotary embedding, per row and KV head, from the queries of the prompt.

    Parameters
    ----------
    ratio : float
        Share of the channels to keep, in (0, 1]; at least 16 channels.
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
        """Bytes of partial keys and directions."""
        return sum(part.numel() * part.element_size() for part in (self._basis, self._keys) if part is not None)

    def learn(self, vectors: torch.Tensor) -> None:
        """Compute the directions from queries (or keys), (batch, kv_heads, n, head_dim); zero vectors are ignored."""
        wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        channels = wide.shape[-1]
        kept = min(channels, max(FEWEST, round(self.ratio * channels)))
        # eigh sorts eigenvalues in ascending order.
        vectors = torch.linalg.eigh(wide.transpose(-1, -2) @ wide).eigenvectors
        self._basis = vectors[..., channels - kept :].contiguous()

    def extend(self, keys: torch.Tensor) -> None:
        """Append the keys of the next tokens, (batch, kv_heads, tokens, head_dim)."""
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
        """Approximate q.k, (batch, kv_heads, group, length), of queries (batch, query_heads, 1, head_dim)."""
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
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``."""
        if self._basis is not None:
            rows = rows.to(self._basis.device)
            self._basis = self._basis[rows]
            self._keys = None if self._keys is None else self._keys[rows]

    def fork(self) -> PartialKeys:
        """An independent copy."""
        twin = PartialKeys(self.ratio)
        twin.__dict__.update(self.__dict__, _keys=None if self._keys is None else self._keys.clone())
        return twin

    def state_dict(self) -> State:
        """Directions and partial keys, as views that are valid until the next change."""
        keys = None if self._keys is None else self._keys[:, :, : self.length]
        return {"basis": self._basis, "keys": keys}

    def load_state_dict(self, state: State, batch: int, heads: int, tokens: int, device: torch.device) -> None:
        """Take what :meth:`state_dict` gave, of at most ``tokens`` tokens; SessionError if it does not fit."""
        basis = maybe_tensor_in(state, "basis", (batch, heads, None, None))
        keys = None
        if basis is not None:
            keys = maybe_tensor_in(state, "keys", (batch, heads, None, basis.shape[3]))
        if keys is not None and keys.shape[2] > tokens:
            raise SessionError(f"there are partial keys of {keys.shape[2]} tokens, and {tokens} tokens")
        self._basis = None if basis is None else basis.to(device, copy=True)
        self._keys = None if keys is None else keys.to(device, copy=True)
        self.length = 0 if keys is None else keys.shape[2]
