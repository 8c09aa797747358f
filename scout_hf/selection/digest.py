"""What a digest must be able to do, and the digests known by name."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from scout_hf.registry import Registry


class Digest(ABC):
    """A small code per block of keys from which a query's interest in the block can be estimated.

    A subclass sets ``name``, is registered with :func:`register_digest`, and keeps no state. ``native`` names the way
    in which native code scores these codes, where there is one.
    """

    name: str = ""
    native: str | None = None

    @abstractmethod
    def encode(self, keys: torch.Tensor, exists: torch.Tensor | None) -> torch.Tensor:
        """Codes of whole blocks.

        Parameters
        ----------
        keys : Tensor (batch, kv_heads, blocks, block_size, head_dim)
            Keys as they are attended (after RoPE).
        exists : Tensor (batch, blocks, block_size) of bool, or None
            Tokens that are no padding; None when all are real.

        Returns
        -------
        Tensor (batch, kv_heads, blocks, code)
        """

    @abstractmethod
    def score(self, query: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Interest of each KV head in each block, (batch, kv_heads, blocks) of float32, larger is better.

        ``query`` is (batch, query_heads, 1, head_dim), ``codes`` (batch, kv_heads, blocks, code). Query heads of one
        GQA group are reduced to one score.
        """


_DIGESTS: Registry[Digest] = Registry("digest")


def register_digest(digest: type[Digest]) -> type[Digest]:
    """Make a digest available as ``ScoutConfig(digest=name)``; usable as a class decorator."""
    return _DIGESTS.register(digest, Digest)


def digest_names() -> tuple[str, ...]:
    """Names that ``ScoutConfig(digest=...)`` takes."""
    return _DIGESTS.names()


def make_digest(name: str) -> Digest:
    """The digest of that name, or ConfigError with the names there are."""
    return _DIGESTS.find(name)()
