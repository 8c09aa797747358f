"""The interface of a digest, and the registry of digests by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from scout_hf.errors import SavingError, SessionError
from scout_hf.registry import Registry


class Digest(ABC):
    """A small code per block of keys, from which the block's score against a query is computed.

    One object serves one layer of one cache. Subclass it, set ``name``, implement ``encode`` and ``score``, and
    register it with :func:`register_digest`.

    Attributes
    ----------
    name : str
        Value of ``ScoutConfig(digest=...)``.
    native : str or None
        Name of the native scorer for these codes (see ``CpuBackend.select``), if there is one.
    needs_fit : bool
        Whether ``fit`` must run before ``encode``. It computes constants per row and KV head, so that a row is encoded
        independently of the batch. Codes of an earlier ``fit`` are void.
    per_head : bool
        Whether ``score`` returns the logarithm, base 2, of each query head's attention mass in a block. Blocks are then
        ranked by the mean over a GQA group of the mass's share; see
        :func:`scout_hf.selection.group_mass.mean_share`.

    Examples
    --------
    >>> import torch
    >>> from scout_hf.selection import Digest
    >>> class MeanKey(Digest):
    ...     name = "mean"
    ...
    ...     def encode(self, keys, padding_mask):
    ...         return keys.mean(3)
    ...
    ...     def score(self, query, codes):
    ...         grouped = query.unflatten(1, (codes.shape[1], -1)).sum(2)
    ...         return (codes @ grouped.transpose(-1, -2)).squeeze(-1).float()
    >>> digest = MeanKey()
    >>> codes = digest.encode(torch.randn(1, 2, 3, 4, 8), None)
    >>> digest.score(torch.randn(1, 4, 1, 8), codes).shape
    torch.Size([1, 2, 3])
    """

    name: str = ""
    native: str | None = None
    needs_fit: bool = False
    per_head: bool = False

    @classmethod
    def serves(cls, head_dim: int) -> bool:
        """Whether keys of that head size can be encoded."""
        return True

    def fit(
        self, keys: torch.Tensor, padding_mask: torch.Tensor | None, query_power: torch.Tensor | None, scale: float
    ) -> None:
        """Compute constants from keys; of a long context, from a sample.

        Parameters
        ----------
        keys, padding_mask
            Whole blocks, as in :meth:`encode`.
        query_power : Tensor (batch, kv_heads, head_dim) of float32, or None
            Mean square of the prompt's queries per channel, over the GQA group; None if no queries were seen.
        scale : float
            Factor on q.k before the softmax.
        """

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace the constants of row ``i`` by those of the former row ``rows[i]``, for every ``i``."""

    def state_dict(self) -> dict[str, Any]:
        """The constants of :meth:`fit`, for a saved session: all attributes, which must be tensors, numbers or words.

        Raises
        ------
        SavingError
            If an attribute is something else: override both methods then.
        """
        for name, value in vars(self).items():
            if not isinstance(value, (torch.Tensor, int, float, str, type(None))):
                raise SavingError(
                    f"digest {self.name!r} cannot be saved: its {name} is of type {type(value).__name__}; "
                    "define state_dict() and load_state_dict()"
                )
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any], batch: int, device: torch.device) -> None:
        """Take what :meth:`state_dict` of the same digest gave; tensors of ``batch`` rows go to ``device``."""
        for name, value in state.items():
            if name.startswith("__") or isinstance(getattr(type(self), name, None), property):
                raise SessionError(f"a digest has no attribute {name}")
            setattr(self, name, value.to(device, copy=True) if isinstance(value, torch.Tensor) else value)

    @abstractmethod
    def encode(self, keys: torch.Tensor, padding_mask: torch.Tensor | None) -> torch.Tensor:
        """Encode whole blocks.

        Parameters
        ----------
        keys : Tensor (batch, kv_heads, blocks, block_size, head_dim)
            Keys as they are attended (after RoPE).
        padding_mask : Tensor (batch, blocks, block_size) of bool, or None
            False for padding; None if there is none.

        Returns
        -------
        Tensor (batch, kv_heads, blocks, code)
        """

    @abstractmethod
    def score(self, query: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Score every block for every KV head, or with ``per_head`` for every query head.

        Parameters
        ----------
        query : Tensor (batch, query_heads, 1, head_dim)
            Without ``per_head``, the query heads of a GQA group are reduced to one score.
        codes : Tensor (batch, kv_heads, blocks, code)

        Returns
        -------
        Tensor (batch, kv_heads or query_heads, blocks) of float32
            Larger is better.
        """

    def centre(self, query: torch.Tensor) -> torch.Tensor | float:
        """What the logits behind ``score`` lack, base 2, (batch, query_heads) or a number; for ``per_head``."""
        return 0.0

    def prepare(self, query: torch.Tensor) -> torch.Tensor:
        """The query in the form that the ``native`` scorer takes; unchanged by default."""
        return query


def repeat_real(keys: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
    """Keys with each padding token replaced by the first real token of its block; arguments as in ``encode``.

    For codes that cannot represent padding.
    """
    first = padding_mask.to(torch.uint8).argmax(-1, keepdim=True)
    place = torch.where(
        padding_mask, torch.arange(padding_mask.shape[-1], dtype=torch.int64, device=padding_mask.device), first
    )
    return keys.gather(3, place[:, None, :, :, None].expand_as(keys))


_DIGESTS: Registry[Digest] = Registry("digest", also=("auto",))


def register_digest(digest: type[Digest]) -> type[Digest]:
    """Register a digest for ``ScoutConfig(digest=name)``; usable as a class decorator.

    Parameters
    ----------
    digest : type of Digest

    Returns
    -------
    type of Digest
        The same class.

    Raises
    ------
    ConfigError
        If its ``name`` is empty or taken, or it is not a subclass of :class:`Digest`.

    Examples
    --------
    >>> from scout_hf.selection import MinMax, digest_names, register_digest
    >>> @register_digest
    ... class MyMinMax(MinMax):
    ...     name = "my-minmax"
    >>> "my-minmax" in digest_names()
    True
    """
    return _DIGESTS.register(digest, Digest)


def digest_names() -> tuple[str, ...]:
    """Allowed values of ``ScoutConfig(digest=...)``.

    Examples
    --------
    >>> from scout_hf.selection import digest_names
    >>> "minmax" in digest_names()
    True
    """
    return _DIGESTS.names()


def find_digest(name: str) -> type[Digest]:
    """The digest class of that name; ConfigError with the known names if there is none."""
    return _DIGESTS.find(name)


def make_digest(name: str) -> Digest:
    """Create a digest by name.

    Parameters
    ----------
    name : str
        A registered name, not ``"auto"``.

    Returns
    -------
    Digest

    Raises
    ------
    ConfigError
        If the name is unknown; the message lists the known ones.

    Examples
    --------
    >>> from scout_hf.selection import make_digest
    >>> make_digest("minmax").name
    'minmax'
    """
    return find_digest(name)()
