"""Single recalled tokens on the device: used once, or kept until other tokens take their slots."""

from __future__ import annotations

import torch

from scout_hf.errors import CacheStateError
from scout_hf.stores.resident_slots import Recall, ResidentSlots
from scout_hf.stores.state import State, state_in, tensor_in

GROWTH = 1.125
NOTHING = "no tokens are planned: call plan() first, then put() the tokens that it returned, then content() once"


class StreamedTokens:
    """Recalled tokens that are used by one attention and not kept; the interface of :class:`TokenCache`."""

    used_bytes = 0

    def __init__(self) -> None:
        self._valid: torch.Tensor | None = None
        self._here: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def planned(self) -> bool:
        """Whether a plan waits for ``content``."""
        return self._valid is not None

    def plan(self, ids: torch.Tensor, valid: torch.Tensor, tokens: int) -> tuple[torch.Tensor, None]:
        """Every chosen token must be recalled."""
        self._valid = valid
        return ids, None

    def put(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Accept the recalled keys and values, (batch, kv_heads, n, head_dim) each."""
        self._here = keys, values

    def content(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The keys and values given to ``put``, and which of them are valid; may be called once."""
        here, valid = self._here, self._valid
        self.forget()
        if here is None or valid is None:
            raise CacheStateError(NOTHING)
        return *here, valid

    def forget(self) -> None:
        """Drop the plan."""
        self._valid = self._here = None

    def crop(self, length: int) -> None:
        """Drop the plan; nothing else is kept."""
        self.forget()

    def select_rows(self, rows: torch.Tensor) -> None:
        """Drop the plan; nothing else is kept."""
        self.forget()

    def fork(self) -> StreamedTokens:
        """A new, empty object: nothing is kept between attentions."""
        return StreamedTokens()

    def state_dict(self) -> State:
        """Nothing is kept between attentions."""
        return {}

    def load_state_dict(self, state: State, tokens: int) -> None:
        """Nothing is kept between attentions."""


class TokenCache:
    """Chosen tokens of each row and KV head; only those that are not resident yet are recalled.

    Call ``plan`` with the chosen tokens, ``put`` with the ones that it reports missing (or ``forget``), then
    ``content``.

    Parameters
    ----------
    batch, heads, head_dim : int
        KV heads.
    dtype : torch.dtype
    device : torch.device
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
        """Whether a plan waits for ``content``."""
        return self._chosen is not None

    def plan(self, ids: torch.Tensor, valid: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Make these tokens resident, and return those that must be recalled; None if there are none.

        Parameters
        ----------
        ids : Tensor (batch, kv_heads, chosen) of int64
            Distinct token positions below ``tokens``.
        valid : Tensor of bool, of the same shape
            False for entries to ignore.
        tokens : int
            Tokens that could be chosen.

        Returns
        -------
        ids, real : Tensor (batch, kv_heads, n)
            Token positions, and which of them must be recalled.
        """
        self.forget()
        slots = self._take_slots()
        if ids.shape[2] > slots.slots:
            slots.grow(int(ids.shape[2] * GROWTH))
        self._recall = slots.plan_recall(ids, valid, tokens)
        self._chosen = slots.among(ids, valid, tokens)
        self._slots = slots
        return None if self._recall is None else (self._recall.ids, self._recall.real)

    def _take_slots(self) -> ResidentSlots:
        """Take the slots out, to be put back once changed: after an error there are none, and all is recalled again."""
        slots, self._slots = self._slots, ResidentSlots(*self._sizes)
        return slots

    def put(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the tokens that ``plan`` reported missing, (n, head_dim) each, in the order of ``real.nonzero()``."""
        if self._recall is None:
            raise CacheStateError(NOTHING)
        # Still planned until all of it is stored: after an interrupt, ``forget`` must find it.
        self._recall.put(keys[:, None], values[:, None])
        self._recall = None

    def forget(self) -> None:
        """Drop the plan: its missing tokens will not arrive."""
        self._chosen = None
        if self._recall is not None:
            self._recall.forget()
            self._recall = None

    def content(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values (batch, kv_heads, slots, head_dim), and which slots were chosen; may be called once."""
        chosen, self._chosen = self._chosen, None
        if chosen is None:
            raise CacheStateError(NOTHING)
        return *self._slots.content(), chosen[:, :, : self._slots.filled]

    def crop(self, length: int) -> None:
        """Drop the tokens from ``length`` on."""
        self.forget()
        slots = self._take_slots()
        slots.crop(length)
        self._slots = slots

    def select_rows(self, rows: torch.Tensor) -> None:
        """Replace row ``i`` by the former row ``rows[i]``, for every ``i``."""
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

    def state_dict(self) -> State:
        """The tokens that are kept."""
        return {"slots": self._slots.state_dict(None)}

    def load_state_dict(self, state: State, tokens: int) -> None:
        """Take what :meth:`state_dict` gave, of a context of ``tokens``; SessionError if it does not fit."""
        held, batch, heads = state_in(state, "slots"), *self._sizes[:2]
        slots = ResidentSlots(*self._sizes)
        slots.grow(tensor_in(held, "ids", (batch, heads, None)).shape[2])
        slots.load_state_dict(held, None, tokens)
        self._slots = slots
