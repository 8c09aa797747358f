"""Single tokens that came from the host: used once, or kept on the device until others take their places."""

from __future__ import annotations

import torch

from scout_hf.errors import CacheStateError
from scout_hf.stores.resident_slots import Recall, ResidentSlots

ROOM = 1.125
NOTHING = "no token was chosen: call plan() first, then put() what it asks for, then content() once"


class StreamedTokens:
    """Tokens that come for one attention and are gone; the same calls as those of :class:`TokenCache`."""

    used_bytes = 0

    def __init__(self) -> None:
        self._valid: torch.Tensor | None = None
        self._here: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def planned(self) -> bool:
        """Whether something was chosen that has not been asked for yet."""
        return self._valid is not None

    def plan(self, ids: torch.Tensor, valid: torch.Tensor, tokens: int) -> tuple[torch.Tensor, None]:
        """All of them must come."""
        self._valid = valid
        return ids, None

    def put(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """They are here, (batch, kv_heads, n, head_dim) each."""
        self._here = keys, values

    def content(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values as they came, and which of them count; once."""
        here, valid = self._here, self._valid
        self.forget()
        if here is None or valid is None:
            raise CacheStateError(NOTHING)
        return *here, valid

    def forget(self) -> None:
        """Nothing was chosen."""
        self._valid = self._here = None

    def crop(self, length: int) -> None:
        """Nothing stays."""
        self.forget()

    def select_rows(self, rows: torch.Tensor) -> None:
        """Nothing stays."""
        self.forget()

    def fork(self) -> StreamedTokens:
        """Another one."""
        return StreamedTokens()


class TokenCache:
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
        self._sizes = (batch, heads, 0, 1, head_dim, dtype, device)
        self._slots = ResidentSlots(*self._sizes)
        self._recall: Recall | None = None
        self._chosen: torch.Tensor | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes of the slots, used or not."""
        return self._slots.used_bytes

    @property
    def planned(self) -> bool:
        """Whether something was chosen that has not been asked for yet."""
        return self._chosen is not None

    def plan(self, ids: torch.Tensor, valid: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Hold these tokens from now on, and say which must come; None for none.

        Parameters
        ----------
        ids : Tensor (batch, kv_heads, chosen) of int64
            All below ``tokens``, each once.
        valid : Tensor of bool, of the same shape
            Which of them count.
        tokens : int
            How many there are to choose from.

        Returns
        -------
        ids, real : Tensor (batch, kv_heads, n)
            Tokens, and which of them are missing.
        """
        self.forget()
        slots = self._take_slots()
        if ids.shape[2] > slots.slots:
            slots.grow(int(ids.shape[2] * ROOM))
        self._recall = slots.plan_recall(ids, valid, tokens)
        self._chosen = slots.among(ids, valid, tokens)
        self._slots = slots
        return None if self._recall is None else (self._recall.ids, self._recall.real)

    def _take_slots(self) -> ResidentSlots:
        """The slots, to be put back when they are changed: until then there are none, and all must come again."""
        slots, self._slots = self._slots, ResidentSlots(*self._sizes)
        return slots

    def put(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """What ``plan`` asked for is here, (tokens, head_dim) each, in the order of ``real.nonzero()``."""
        if self._recall is None:
            raise CacheStateError(NOTHING)
        # Planned until all of it is in its place: an interrupt must find it to forget.
        self._recall.put(keys[:, None], values[:, None])
        self._recall = None

    def forget(self) -> None:
        """What ``plan`` asked for will not come."""
        self._chosen = None
        if self._recall is not None:
            self._recall.forget()
            self._recall = None

    def content(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values (batch, kv_heads, slots, head_dim), and which of the slots were chosen; once."""
        chosen, self._chosen = self._chosen, None
        if chosen is None:
            raise CacheStateError(NOTHING)
        return *self._slots.content(), chosen[:, :, : self._slots.filled]

    def crop(self, length: int) -> None:
        """Let go of the tokens from ``length`` on."""
        self.forget()
        slots = self._take_slots()
        slots.crop(length)
        self._slots = slots

    def select_rows(self, rows: torch.Tensor) -> None:
        """Make row ``i`` what row ``rows[i]`` was."""
        self.forget()
        slots, sizes = self._take_slots(), self._sizes
        slots.select_rows(rows)
        self._sizes = (len(slots.ids), *sizes[1:])
        self._slots = slots

    def fork(self) -> TokenCache:
        """An independent copy."""
        twin = object.__new__(TokenCache)
        twin.__dict__.update(self.__dict__, _slots=self._slots.fork(), _recall=None, _chosen=None)
        return twin
