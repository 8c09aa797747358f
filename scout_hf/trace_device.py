"""When work on a GPU began and ended, in host time.

Marks are CUDA events, which cost the host about a microsecond each and do not synchronise. They are read when recording
is over. One more event, whose end the host observes, relates the device's clock to the host's.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


class DeviceClocks:
    """Marks on the streams of GPUs; other devices have none."""

    def __init__(self) -> None:
        self._anchors: dict[torch.device, tuple[torch.cuda.Event, int] | None] = {}

    def mark(self, device: torch.device) -> torch.cuda.Event | None:
        """Mark the end of the work on the device's current stream; None for a CPU or during graph capture.

        An event in a captured graph cannot be queried.
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
        """A function that returns the times of two marks, in ns of ``time.perf_counter_ns``; None until ``settle``."""

        def times() -> tuple[int, int] | None:
            if (known := self._anchors[device]) is None:
                return None
            anchor, here = known
            began, ended = (here - int(event.elapsed_time(anchor) * 1e6) for event in (begin, end))
            return began, ended

        return times

    def settle(self) -> None:
        """Wait for all marked devices, and read their clocks."""
        for device in self._anchors:
            torch.cuda.synchronize(device)
            anchor = torch.cuda.Event(enable_timing=True)
            anchor.record(torch.cuda.current_stream(device))
            while not anchor.query():  # poll: a sleeping thread would notice later
                pass
            self._anchors[device] = anchor, time.perf_counter_ns()
