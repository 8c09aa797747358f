"""Stand-ins for torch.cuda on the tensors of ``tests/fake_devices.py``: they refuse what CUDA refuses, and more.

Work is done at once, so nothing here tells whether one stream waits for another, only that each is of the right device.
"""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import NamedTuple

import torch

from scout_hf.kernels.cpu import workers
from tests.fake_devices import CPU, FakeDevices, MixedDevices, OnDevice, Pinned, tensors, unwrapped, wrapped
from tests.triton import reference


class Event:
    """Belongs to the device of the stream that records it first, and tells the time of a clock of that device."""

    def __init__(self, enable_timing=False):
        self.device = self.at = None

    def record(self, stream=None):
        stream = torch.cuda.current_stream() if stream is None else stream
        if self.device not in (None, stream.device):
            raise MixedDevices(f"an event of {self.device} recorded on a stream of {stream.device}")
        self.device, self.at = stream.device, 1000.0 + time.perf_counter()

    def elapsed_time(self, other):
        if self.device != other.device:
            raise MixedDevices(f"time between events of {self.device} and {other.device}")
        return (other.at - self.at) * 1e3

    def wait(self, stream=None):
        pass  # events cross devices

    def synchronize(self):
        pass

    def query(self):
        return self.at is not None


class Stream:
    def __init__(self, device=None):
        self.device = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def wait_event(self, event):
        event.wait(self)

    def record_event(self, event=None):
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self):
        pass


class Launch(NamedTuple):
    """A kernel that ran: its name, the device of its tensors, the stream that was current there."""

    name: str
    device: torch.device
    stream: Stream


class Cuda:
    """Which device and which streams are current, and all that was launched."""

    def __init__(self):
        self.here, self.streams, self.main = torch.device("cuda:0"), {}, {}
        self.launched: list[Launch] = []

    @contextlib.contextmanager
    def device(self, device):
        before, self.here = self.here, torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        try:
            yield
        finally:
            self.here = before

    @contextlib.contextmanager
    def stream(self, stream):
        before = self.streams.get(stream.device)
        self.streams[stream.device] = stream
        with self.device(stream.device):
            try:
                yield
            finally:
                self.streams[stream.device] = before

    def current_stream(self, device=None):
        device = self.here if device is None else torch.device(device)
        return self.streams.get(device) or self.main.setdefault(device, Stream(device))

    def launch(self, name, function, args, kwargs, guarded=False):
        """Run a kernel on plain tensors; ``guarded``: as Triton does it, on the device that is current."""
        given = tensors(args, kwargs)
        devices = {each.device for each in given if isinstance(each, OnDevice)}
        if len(devices) != 1:
            raise MixedDevices(f"{name} of tensors on {sorted(map(str, devices))}")
        (device,) = devices
        if guarded and device != self.here:
            raise MixedDevices(f"{name} launched on {self.here} for tensors on {device}")
        for each in given:
            if each.device == CPU and not Pinned.holds(each.data_ptr()):
                raise MixedDevices(f"{name} cannot read host memory that is not pinned")
        self.launched.append(Launch(name, device, self.current_stream(device)))
        with torch.utils._python_dispatch._disable_current_modes():
            found = function(*unwrapped(args), **unwrapped(kwargs))
        return wrapped(found, device, args, kwargs)


PROPERTIES = SimpleNamespace(multi_processor_count=4, shared_memory_per_block_optin=227 << 10)


def install(monkeypatch) -> Cuda:
    """Fake devices for the rest of the test, in threads of ours too."""
    cuda = Cuda()
    for name, value in {
        "is_available": lambda: True, "device_count": lambda: 2, "synchronize": lambda device=None: None,
        "current_device": lambda: cuda.here.index, "device": cuda.device, "empty_cache": lambda: None,
        "stream": cuda.stream, "Stream": Stream, "Event": Event, "current_stream": cuda.current_stream,
        "is_current_stream_capturing": lambda: False, "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "fake", "get_device_properties": lambda device: PROPERTIES,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(Pinned, "spans", {})
    # Slabs of tiny models too are mapped and registered.
    monkeypatch.setattr("scout_hf.stores.memory.HUGE_BYTES", 4096)
    monkeypatch.setattr("scout_hf.stores.memory.pin", Pinned.spans.__setitem__)
    monkeypatch.setattr("scout_hf.stores.memory.unpin", lambda address: Pinned.spans.pop(address, None))
    monkeypatch.setattr("scout_hf.stores.pages.host_address_serves", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: Pinned.add(self.clone()))
    # Made where torch's own code does not ask a driver.
    make = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, device=None, **how: _moved(make(data, **how), device))
    bare = workers._bare

    def elsewhere(job, args):
        with FakeDevices():  # a mode holds for its own thread
            return bare(job, args)

    monkeypatch.setattr(workers, "_bare", elsewhere)
    return cuda


def _moved(tensor, device):
    return tensor if device is None else tensor.to(device)


def use_references(monkeypatch, cuda: Cuda) -> SimpleNamespace:
    """Let ``TritonExecutor`` launch the kernels' references; what is returned are these, to plant errors in."""

    def kernel(name, function):
        return lambda *args, **kwargs: cuda.launch(name, function, args, kwargs)

    plain = {"Choice", "kv_splits_for", "INTERPRETED", "run_of_blocks", "encode", "score"}
    kernels = {name: value if name in plain else kernel(name, value) for name, value in vars(reference.KERNELS).items()}
    kernels["copy_blocks"] = _reads_pinned(kernels["copy_blocks"])
    kernels = SimpleNamespace(**kernels)
    monkeypatch.setattr("scout_hf.kernels.device._load", lambda: kernels)
    return kernels


def _reads_pinned(copy_blocks):
    def checked(pages, *args):
        if not all(Pinned.holds(address) for address in pages.held.flatten().tolist() if address):
            raise MixedDevices("copy_blocks cannot read pages that are not pinned")
        return copy_blocks(pages, *args)

    return checked


def use_kernels(monkeypatch, cuda: Cuda) -> None:
    """Let Triton's interpreter run the kernels themselves, each only if the current device is that of its tensors."""
    from triton.runtime.interpreter import InterpretedFunction

    real = InterpretedFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        def interpret(*args, **kwargs):
            real(self, *args, grid=grid, warmup=warmup, **kwargs)

        cuda.launch(self.fn.__name__, interpret, args, kwargs, guarded=True)

    monkeypatch.setattr(InterpretedFunction, "run", run)
