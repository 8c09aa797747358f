"""What a digest must be able to do, and the digests known by name."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from scout_hf.registry import Registry


class Digest(ABC):
    """A small code per block of keys from which a query's interest in the block can be estimated.

    One object serves one layer of one cache. A subclass sets ``name`` and is registered with :func:`register_digest`.
    ``native`` names the way in which native code scores these codes, where there is one. A digest that needs constants
    takes them in ``fit``, for every row and KV head its own, so that a row is coded as if it were alone; codes made
    before another ``fit`` are void.
    """

    name: str = ""
    native: str | None = None
    needs_fit: bool = False

    @classmethod
    def serves(cls, head_dim: int) -> bool:
        """Whether keys of that size can be coded."""
        return True

    def fit(
        self, keys: torch.Tensor, padding_mask: torch.Tensor | None, query_power: torch.Tensor | None, scale: float
    ) -> None:
        """Take constants from keys of whole blocks, as ``encode`` gets them; of a long context, from a sample.

        ``query_power`` (batch, kv_heads, head_dim) of float32 is the mean square of a prompt's queries per channel,
        over the GQA group; None where no queries were seen. ``scale`` turns q.k into what goes into the softmax.
        """

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make the constants of row ``i`` those that row ``rows[i]`` had."""

    @abstractmethod
    def encode(self, keys: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Codes of whole blocks.

        Parameters
        ----------
        keys : Tensor (batch, kv_heads, blocks, block_size, head_dim)
            Keys as they are attended (after RoPE).
        padding_mask : Tensor (batch, blocks, block_size) of bool, or None
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

    def prepare(self, query: torch.Tensor) -> torch.Tensor:
        """The query as native code of that name wants it; by default as it is."""
        return query


def repeat_real(keys: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
    """Keys whose padding tokens are copies of the first real token of their block; both as ``encode`` gets them.

    For codes that have no way to say that a token does not exist.
    """
    first = padding_mask.to(torch.uint8).argmax(-1, keepdim=True)
    place = torch.where(
        padding_mask, torch.arange(padding_mask.shape[-1], dtype=torch.int64, device=padding_mask.device), first
    )
    return keys.gather(3, place[:, None, :, :, None].expand_as(keys))


_DIGESTS: Registry[Digest] = Registry("digest", also=("auto",))


def register_digest(digest: type[Digest]) -> type[Digest]:
    """Make a digest available as ``ScoutConfig(digest=name)``; usable as a class decorator."""
    return _DIGESTS.register(digest, Digest)


def digest_names() -> tuple[str, ...]:
    """Names that ``ScoutConfig(digest=...)`` takes."""
    return _DIGESTS.names()


def find_digest(name: str) -> type[Digest]:
    """The digest of that name, or ConfigError with the names there are."""
    return _DIGESTS.find(name)


def make_digest(name: str) -> Digest:
    """A new object of the digest of that name, or ConfigError with the names there are."""
    return find_digest(name)()
