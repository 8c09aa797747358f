"""Emulate the link or CPU of another machine on one memory: work takes as long as it would take there."""

from __future__ import annotations

import threading
import time
from typing import Any, TypeVar

from scout_hf.kernels.cpu.protocols import T_co, Ticket

T = TypeVar("T")


class EmulatedLink:
    """A serial resource with limited bandwidth (a link, or CPU reads); thread-safe."""

    def __init__(self) -> None:
        self._free_at = 0.0
        self._lock = threading.Lock()

    def limit(self, ticket: Ticket[T], nbytes: int, gbps: float | None) -> Ticket[T]:
        """A ticket that ends with ``ticket``, but not before ``nbytes`` more have crossed at ``gbps`` (GB/s)."""
        if gbps is None:
            return ticket
        with self._lock:
            begin = max(time.perf_counter(), self._free_at)
            self._free_at = begin + nbytes / (gbps * 1e9)
            return LimitedTicket(ticket, self._free_at, begin)

    def __reduce__(self) -> tuple[Any, ...]:
        return EmulatedLink, ()


class LimitedTicket(Ticket[T_co]):
    """A transfer that occupies an emulated link from ``begin`` to ``due`` (seconds of ``time.perf_counter``)."""

    def __init__(self, ticket: Ticket[T_co], due: float, begin: float):
        self._ticket, self.due, self.begin = ticket, due, begin

    def wait(self) -> T_co:
        """The transfer's result; blocks until ``due``."""
        result = self._ticket.wait()
        if (left := self.due - time.perf_counter()) > 0:
            time.sleep(left)
        return result

    def drain(self) -> bool:
        """Block until the memory is no longer written to; returns whether the transfer succeeded."""
        return self._ticket.drain()

    def done(self) -> bool:
        """Whether the transfer has ended and ``due`` is past."""
        return self._ticket.done() and time.perf_counter() >= self.due

    def times(self) -> tuple[int, int]:
        """When the transfer began and ended on the emulated link, ns."""
        return int(self.begin * 1e9), int(self.due * 1e9)


class Done(Ticket[None]):
    """The ticket of work that was done when it was asked for."""

    def wait(self) -> None:
        """Nothing to wait for."""

    def drain(self) -> bool:
        """It succeeded."""
        return True

    def done(self) -> bool:
        """It is."""
        return True

    def times(self) -> tuple[int, int] | None:
        """They are not known."""
        return None
