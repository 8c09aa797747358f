"""Another machine's link, or CPU, over tiers that share one memory: work takes as long as it would there."""

from __future__ import annotations

import threading
import time
from typing import Any


class EmulatedLink:
    """Books work one after another, transfers or reading; safe to use from several threads."""

    def __init__(self):
        self._free_at = 0.0
        self._lock = threading.Lock()

    def limit(self, ticket: Any, nbytes: int, gbps: float | None) -> Any:
        """A ticket that is done when ``ticket`` is, and not before ``nbytes`` more have crossed at ``gbps``."""
        if gbps is None:
            return ticket
        with self._lock:
            begin = max(time.perf_counter(), self._free_at)
            self._free_at = begin + nbytes / (gbps * 1e9)
            return LimitedTicket(ticket, self._free_at, begin)

    def __reduce__(self):
        return EmulatedLink, ()


class LimitedTicket:
    """A transfer over an emulated link, which is busy with it from ``begin`` to ``due`` (``time.perf_counter``)."""

    def __init__(self, ticket: Any, due: float, begin: float):
        self._ticket, self.due, self.begin = ticket, due, begin

    def wait(self) -> Any:
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
