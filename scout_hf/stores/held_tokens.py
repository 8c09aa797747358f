"""Single tokens that came from the host and stay on the device until others take their places."""

from __future__ import annotations

import torch

from scout_hf.stores.device import Recall, ResidentSlots

ROOM = 1.125


class HeldTokens:
    """Keys and values of each row's and KV head's chosen tokens; only those cross the link that are not here yet.

    ``plan`` what is to come, ``put`` it when it is here, or ``forget`` it; then ``content`` is what was chosen.

    Parameters
    ----------
    batch, heads, head_dim : int
        KV heads.
    dtype, device
        Of what is held.
    """

    def __init__(self, batch: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self._slots = ResidentSlots(batch, heads, 0, 1, head_dim, dtype, device)
        self._recall: Recall | None = None
        self._chosen: torch.Tensor | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots, used or not."""
        return self._slots.used_bytes

    def plan(self, ids: torch.Tensor, usable: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Hold these tokens from now on, and say which must come; None for none.

        Parameters
        ----------
        ids : Tensor (batch, kv_heads, chosen) of int64
            All below ``tokens``, each once.
        usable : Tensor of bool, of the same shape
            Which of them count.
        tokens : int
            How many there are to choose from.

        Returns
        -------
        ids, real : Tensor (batch, kv_heads, n)
            Tokens, and which of them are missing.
        """
        self.forget()
        if ids.shape[2] > self._slots.slots:
            self._slots.grow(int(ids.shape[2] * ROOM))
        self._recall = self._slots.plan_recall(ids, usable, tokens)
        self._chosen = self._slots.among(ids, usable, tokens)
        return None if self._recall is None else (self._recall.ids, self._recall.real)

    def put(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """What ``plan`` asked for is here, (tokens, head_dim) each, in the order of ``real.nonzero()``."""
        recall, self._recall = self._recall, None
        recall.put(keys[:, None], values[:, None])

    def forget(self) -> None:
        """What ``plan`` asked for will not come."""
        recall, self._recall, self._chosen = self._recall, None, None
        if recall is not None:
            recall.forget()

    def content(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values (batch, kv_heads, slots, head_dim), and which of the slots were chosen."""
        return *self._slots.content(), self._chosen[:, :, : self._slots.filled]

    def crop(self, length: int) -> None:
        """Let go of the tokens from ``length`` on."""
        self.forget()
        self._slots.crop(length)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row ``i`` what row ``rows[i]`` was."""
        self.forget()
        self._slots.select_rows(rows)

    def fork(self) -> HeldTokens:
        """An independent copy."""
        twin = object.__new__(HeldTokens)
        twin.__dict__.update(self.__dict__, _slots=self._slots.fork(), _recall=None, _chosen=None)
        return twin
