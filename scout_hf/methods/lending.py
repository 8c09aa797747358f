"""One store of keys and values, and several layers that attend over it, each with queries of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scout_hf.methods.base import Method


class Lending:
    """The part of a method for layers that share KV.

    The method of the layer that stores it appends, writes back and saves. Its ``drain``, ``crop``, ``rollback`` and
    ``select_rows`` change the store and then call those of its readers, for what these hold beside it. A reader attends
    in each pass after that layer has settled.

    Attributes
    ----------
    stored_by : int or None
        The layer whose KV this one attends over; None if it stores its own.
    readers : dict of int to Method
        Other layers that attend over this layer's KV, by layer.
    """

    can_lend = False
    """Whether a method of this class can attend over the ``kv`` of another one."""
    kv: Any
    layer_idx: int
    stored_by: int | None = None
    readers: dict[int, Any]

    def borrow(self: Any, other: Method) -> None:
        """Attend over the KV of ``other``, which stores it; called on a new object, and on a fork."""
        self.kv, self.stored_by = other.kv, other.layer_idx
        other.readers[self.layer_idx] = self

    def lend_as(self: Any, other: Method) -> None:
        """Give this object, a fork of ``other``, forks of its readers."""
        for reader in other.readers.values():
            reader.fork().borrow(self)
