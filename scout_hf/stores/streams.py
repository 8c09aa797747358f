"""CUDA side streams: write-back and recall each run on their own stream, ordered by events.

On a CPU the same calls run the work synchronously, so that one code path serves both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from scout_hf.kernels.cpu.protocols import Ticket
from scout_hf.stores.emulated_link import EmulatedLink

T = TypeVar("T")


class Mark:
    """The end of some work on a stream, as an event; ``None`` means that the work is done."""

    def __init__(self, event: torch.cuda.Event | None = None):
        self._event = event

    def before(self, device: torch.device) -> None:
        """Make later launches on the device's current stream wait for this work."""
        if self._event is not None:
            torch.cuda.current_stream(device).wait_event(self._event)

    def finish(self) -> None:
        """Block the calling thread until the work is done."""
        if self._event is not None:
            self._event.synchronize()

    def done(self) -> bool:
        """Whether the work is done."""
        return self._event is None or bool(self._event.query())


class Links:
    """The side streams of a patched model's devices, created at first use. A copy creates its own."""

    def __init__(self) -> None:
        self._streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}
        self._last: dict[torch.device, list[Mark]] = {}
        self._emulated, self._emulated_cpu = EmulatedLink(), EmulatedLink()

    def limit(self, ticket: Ticket[T], nbytes: int, gbps: float | None) -> Ticket[T]:
        """The ticket of a transfer; with ``gbps``, delayed to an emulated link of that bandwidth in GB/s."""
        return self._emulated.limit(ticket, nbytes, gbps)

    def limit_cpu(self, ticket: Ticket[T], nbytes: int, gbps: float | None) -> Ticket[T]:
        """The ticket of CPU attention; with ``gbps``, delayed to an emulated CPU that reads KV at that rate in GB/s."""
        return self._emulated_cpu.limit(ticket, nbytes, gbps)

    def mark(self, device: torch.device) -> Mark:
        """The end of all work launched so far on the device's current stream."""
        if device.type != "cuda":
            return Mark()
        return Mark(torch.cuda.current_stream(device).record_event())

    def beside(
        self, name: str, device: torch.device, *tensors: torch.Tensor, after: Mark | None = None
    ) -> contextlib.AbstractContextManager[Mark]:
        """Context manager: launch its body on a side stream, after all work launched so far on the current stream.

        Parameters
        ----------
        name : str
            Name of the side stream. Work on one stream runs in order.
        device : torch.device
        *tensors
            Device memory that the work uses and that may be freed before the work ends.
        after : Mark or None
            Other work to wait for.

        Yields
        ------
        Mark
            The end of this work; valid once the context is left.
        """
        if device.type != "cuda":
            return contextlib.nullcontext(Mark())
        return self._beside(name, device, tensors, after)

    @contextlib.contextmanager
    def _beside(
        self, name: str, device: torch.device, tensors: tuple[torch.Tensor, ...], after: Mark | None
    ) -> Iterator[Mark]:
        mark, captured = Mark(), torch.cuda.is_current_stream_capturing()
        # A stream that takes part in a capture accepts no other work.
        key = (device, f"captured {name}" if captured else name)
        stream = self._streams.get(key)
        if stream is None:
            stream = self._streams[key] = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream):
                if after is not None:
                    after.before(device)
                yield mark
        finally:
            for tensor in tensors:
                tensor.record_stream(stream)
            mark._event = stream.record_event()
            if captured:
                self._last.setdefault(device, []).append(mark)

    def join_captured(self, device: torch.device) -> None:
        """During a graph capture: make the graph wait for all work on side streams."""
        for mark in self._last.pop(device, []):
            mark.before(device)

    def forget_captured(self, device: torch.device) -> None:
        """Before a graph capture: forget the side-stream work of an earlier capture that failed."""
        self._last.pop(device, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Links:
        return Links()

    def __reduce__(self) -> tuple[Any, ...]:
        return Links, ()
