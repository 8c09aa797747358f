"""When work on a GPU began and ended, told in the time of the host.

Marks are events on streams, which cost the host about a microsecond each and wait for nothing. They are read once,
when recording is over: one more event, whose end the host sees, ties the device's clock to its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class DeviceClocks:
    """Marks on the streams of any number of devices; other devices than GPUs have none."""

    def __init__(self) -> None:
        self._anchors: dict[torch.device, tuple[torch.cuda.Event, int] | None] = {}

    def mark(self, device: torch.device) -> torch.cuda.Event | None:
        """The end of what the device's current stream has been given so far; None where that has no time.

        An event in a captured graph belongs to the graph, and cannot be asked.
        """
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            return None
        self._anchors.setdefault(device)
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def between(
        self, device: torch.device, begin: torch.cuda.Event, end: torch.cuda.Event
    ) -> Callable[[], tuple[int, int] | None]:
        """Asks for the time from one mark to the next, in ns of ``time.perf_counter_ns``; None until ``settle``."""

        def times() -> tuple[int, int] | None:
            if (known := self._anchors[device]) is None:
                return None
            anchor, here = known
            began, ended = (here - int(event.elapsed_time(anchor) * 1e6) for event in (begin, end))
            return began, ended

        return times

    def settle(self) -> None:
        """Wait for all devices that were marked, and read their clocks."""
        for device in self._anchors:
            torch.cuda.synchronize(device)
            anchor = torch.cuda.Event(enable_timing=True)
            anchor.record(torch.cuda.current_stream(device))
            while not anchor.query():  # a thread that sleeps would notice later
                pass
            self._anchors[device] = anchor, time.perf_counter_ns()
