"""Pieces of a layer's host pages that are copied to the device in the order of use, the next ones ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from scout_hf.methods.host_to_device import InFlightCopy


class Piece(NamedTuple):
    """Blocks ``first:last`` of some KV heads, a slice with start and stop."""

    first: int
    last: int
    heads: slice


Bring = Callable[[Piece], InFlightCopy]
"""Starts the copy of a piece."""


class PageStream:
    """The in-flight copies of one layer, in the order of use."""

    def __init__(self) -> None:
        self._copies: list[InFlightCopy] = []

    def start(self, pieces: Sequence[Piece], bring: Bring, most: int = 1) -> None:
        """Let the first ``most`` of these pieces be in flight; others are dropped."""
        self._drop_unless(pieces)
        while len(self._copies) < min(most, len(pieces)):
            self._copies.append(bring(pieces[len(self._copies)]))

    def each(
        self, pieces: Sequence[Piece], bring: Bring, ahead: int, behind: Callable[[int], None] | None = None
    ) -> Iterator[tuple[Piece, InFlightCopy]]:
        """Yield each piece and its copy, to wait for and to use until the next one is asked for.

        Parameters
        ----------
        pieces : sequence of Piece
        bring : callable
        ahead : int
            Copies in flight beside the piece that is used.
        behind : callable, or None
            Called when less is left here: what follows may have so many copies in flight.
        """
        self._drop_unless(pieces)
        for number, piece in enumerate(pieces):
            left = len(pieces) - number
            while len(self._copies) < min(1 + ahead, left):
                self._copies.append(bring(pieces[number + len(self._copies)]))
            if behind is not None and left <= ahead:
                behind(1 + ahead - left)
            yield piece, self._copies[0]
            self._copies.pop(0).give_back()

    def drop(self) -> None:
        """Wait until no copy writes to memory any more, and forget them."""
        while self._copies:
            self._copies[0].drain()
            self._copies.pop(0).give_back()

    def _drop_unless(self, pieces: Sequence[Piece]) -> None:
        # They may have been started before tokens were appended outside a step, or for another kind of pass.
        if any(copy.what != piece for copy, piece in zip(self._copies, pieces)) or len(self._copies) > len(pieces):
            self.drop()
