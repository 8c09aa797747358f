"""Work beside a device's main stream: write-back and recall, each on a stream of its own, ordered by events.

On a CPU there is nothing beside: the same calls do the work at once, so that one code serves both.
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
    """The end of some work on a stream; ``None`` stands for work that is done."""

    def __init__(self, event: torch.cuda.Event | None = None):
        self._event = event

    def before(self, device: torch.device) -> None:
        """Let what is launched from now on, on the device's current stream, begin after this work."""
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
    """The side streams of a patched model's devices, made at first use; a copy makes its own."""

    def __init__(self) -> None:
        self._streams: dict[tuple[torch.device, str], torch.cuda.Stream] = {}
        self._last: dict[torch.device, list[Mark]] = {}
        self._emulated, self._emulated_cpu = EmulatedLink(), EmulatedLink()

    def limit(self, ticket: Ticket[T], nbytes: int, gbps: float | None) -> Ticket[T]:
        """The ticket of a transfer; with ``gbps``, of one over an emulated link that is no faster."""
        return self._emulated.limit(ticket, nbytes, gbps)

    def limit_cpu(self, ticket: Ticket[T], nbytes: int, gbps: float | None) -> Ticket[T]:
        """The ticket of attention on the CPU; with ``gbps``, on an emulated one that reads KV no faster."""
        return self._emulated_cpu.limit(ticket, nbytes, gbps)

    def mark(self, device: torch.device) -> Mark:
        """The end of what the device's current stream has been given so far."""
        if device.type != "cuda":
            return Mark()
        return Mark(torch.cuda.current_stream(device).record_event())

    @contextlib.contextmanager
    def beside(
        self, name: str, device: torch.device, *tensors: torch.Tensor, after: Mark | None = None
    ) -> Iterator[Mark]:
        """Launch the block's work on the stream of that name, behind all that the current stream has been given.

        Parameters
        ----------
        name : str
            Work of one name runs in order.
        device : torch.device
        *tensors
            Device memory that the work uses and that may be given back before it is done.
        after : Mark or None
            Other work that it needs.

        Yields
        ------
        Mark
            The end of this work, once the block is left.
        """
        mark = Mark()
        if device.type != "cuda":
            yield mark
            return
        captured = torch.cuda.is_current_stream_capturing()
        # A stream that takes part in a capture is closed to all other work.
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
        """While a graph is captured: let it end only with all the work beside."""
        for mark in self._last.pop(device, []):
            mark.before(device)

    def forget_captured(self, device: torch.device) -> None:
        """Before a capture: what an earlier one left that failed is no part of this one."""
        self._last.pop(device, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Links:
        return Links()

    def __reduce__(self) -> tuple[Any, ...]:
        return Links, ()
