"""Another machine's link, or CPU, over tiers that share one memory: work takes as long as it would there."""

from __future__ import annotations

import threading
import time
from typing import Any, TypeVar

from scout_hf.kernels.cpu.protocols import T_co, Ticket

T = TypeVar("T")


class EmulatedLink:
    """Books work one after another, transfers or reading; safe to use from several threads."""

    def __init__(self) -> None:
        self._free_at = 0.0
        self._lock = threading.Lock()

    def limit(self, ticket: Ticket[T], nbytes: int, gbps: float | None) -> Ticket[T]:
        """A ticket that is done when ``ticket`` is, and not before ``nbytes`` more have crossed at ``gbps``."""
        if gbps is None:
            return ticket
        with self._lock:
            begin = max(time.perf_counter(), self._free_at)
            self._free_at = begin + nbytes / (gbps * 1e9)
            return LimitedTicket(ticket, self._free_at, begin)

    def __reduce__(self) -> tuple[Any, ...]:
        return EmulatedLink, ()


class LimitedTicket(Ticket[T_co]):
    """A transfer over an emulated link, which is busy with it from ``begin`` to ``due`` (``time.perf_counter``)."""

    def __init__(self, ticket: Ticket[T_co], due: float, begin: float):
        self._ticket, self.due, self.begin = ticket, due, begin

    def wait(self) -> T_co:
        """The transfer's result, once it has crossed."""
        result = self._ticket.wait()
        if (left := self.due - time.perf_counter()) > 0:
            time.sleep(left)
        return result

    def drain(self) -> bool:
        """Block until the memory is no longer written to; whether the transfer got through."""
        return self._ticket.drain()

    def done(self) -> bool:
        """Whether it has crossed."""
        return self._ticket.done() and time.perf_counter() >= self.due

    def times(self) -> tuple[int, int]:
        """What the link is busy with it, ns."""
        return int(self.begin * 1e9), int(self.due * 1e9)
