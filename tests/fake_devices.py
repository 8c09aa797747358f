"""Two GPUs that are none: tensors that claim to be on one, compute on the CPU, and mix as little as on real ones.

``install`` also stands in for what torch.cuda offers of streams and events, and for the kernels by their references.
"""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from scout_hf.kernels.cpu import workers
from tests.triton import reference

aten = torch.ops.aten
# Copies cross devices, and indices may lie on the CPU.
CROSSING = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._unsafe_index.Tensor}


class MixedDevices(RuntimeError):
    """What a real device would not compute."""


class OnDevice(torch.Tensor):
    """A tensor that claims to be on a GPU; ``held`` has its values on the CPU."""

    @staticmethod
    def __new__(cls, held, device):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="meta", requires_grad=False,
        )  # fmt: skip
        # To torch's own code it lies nowhere: that would ask the driver.
        made.held, made.place = held, torch.device(device)
        return made

    @property
    def device(self):
        return self.place

    @property
    def is_cuda(self):
        return True

    @property
    def is_cpu(self):
        return False

    def __repr__(self):
        return f"OnDevice({self.device}, {self.held!r})"

    def record_stream(self, stream):
        assert stream.device == self.device

    def pin_memory(self, *device):
        raise MixedDevices("only memory of the CPU can be pinned")

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            # Its own parts ask for memory "where the query is", which is nowhere.
            return run(func, args, kwargs or {})
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """The operation on the CPU, its results on the device of its operands or the one asked for."""
    operands = []
    tree_map(lambda each: operands.append(each) if isinstance(each, torch.Tensor) else None, (args, kwargs))
    # A number on the CPU goes with any device.
    devices = {each.device for each in operands if each.dim() or each.device.type != "cpu"}
    if func in INDEXING and args[0].device.type != "cpu":
        devices.discard(torch.device("cpu"))
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if func in CROSSING:
        device = wanted or args[0].device
    elif len(devices) > 1:
        raise MixedDevices(f"{func} of tensors on {sorted(map(str, devices))}")
    else:
        device = wanted or next(iter(devices), None)
    args, kwargs = tree_map(lambda each: each.held if isinstance(each, OnDevice) else each, (args, kwargs))
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if wanted is not None:
        kwargs["device"] = "cpu"
    same = {id(each.held): each for each in operands if isinstance(each, OnDevice)}

    def wrap(each):
        if not isinstance(each, torch.Tensor) or device is None or device.type != "cuda":
            return each
        return same[id(each)] if id(each) in same else OnDevice(each, device)  # the same one: in place

    return tree_map(wrap, func(*args, **kwargs))


class FakeDevices(TorchDispatchMode):
    """Also what is made from nothing lands where it is wanted."""

    # With this one torch does not look for a driver when a GPU is named.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return run(func, args, kwargs)


class Event:
    """Takes its time from a clock of the device's own."""

    def __init__(self, enable_timing=False):
        self.at = self.device = None

    def record(self, stream):
        self.at, self.device = 1000.0 + time.perf_counter(), stream.device

    def query(self):
        return self.at is not None

    def elapsed_time(self, later):
        assert later.device == self.device
        return (later.at - self.at) * 1e3


class Stream:
    def __init__(self, device):
        self.device = torch.device(device)

    def wait_stream(self, other):
        assert other.device == self.device

    def wait_event(self, event):
        pass  # events cross devices

    def record_event(self):
        return SimpleNamespace(device=self.device, synchronize=lambda: None, query=lambda: True)

    def synchronize(self):
        pass


def install(monkeypatch, launched: list):
    """Fake devices for the rest of the test; ``launched`` gets the device of every kernel."""
    current, streams, main = [torch.device("cuda:0")], {}, {}

    @contextlib.contextmanager
    def on_device(device):
        current.append(torch.device("cuda", device) if isinstance(device, int) else torch.device(device))
        try:
            yield
        finally:
            current.pop()

    @contextlib.contextmanager
    def on_stream(stream):
        before = streams.get(stream.device)
        streams[stream.device] = stream
        with on_device(stream.device):
            try:
                yield
            finally:
                streams[stream.device] = before

    def stream_of(device=None):
        device = current[-1] if device is None else torch.device(device)
        return streams.get(device) or main.setdefault(device, Stream(device))

    for name, value in {
        "is_available": lambda: True, "current_device": lambda: current[-1].index, "device": on_device,
        "stream": on_stream, "Stream": Stream, "Event": Event, "current_stream": stream_of,
        "synchronize": lambda device=None: None,
        "is_current_stream_capturing": lambda: False, "get_device_capability": lambda device=None: (9, 0),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("scout_hf.stores.memory._pin", lambda address, size: None)
    monkeypatch.setattr("scout_hf.stores.memory._unpin", lambda address, mapping: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    bare = workers._bare

    def elsewhere(job, args):
        with FakeDevices():  # a mode holds for its own thread
            return bare(job, args)

    monkeypatch.setattr(workers, "_bare", elsewhere)

    def kernel(function):
        def launch(*args, **kwargs):
            here = set()

            def plain(each):
                if isinstance(each, OnDevice):
                    here.add(each.device)
                    return each.held
                return each

            given = tree_map(plain, (args, kwargs))
            if len(here) > 1:
                raise MixedDevices(f"{function.__name__} of tensors on {here}")
            launched.extend(here)
            with torch.utils._python_dispatch._disable_current_modes():
                found = function(*given[0], **given[1])
            originals = {}
            tree_map(lambda each: originals.setdefault(id(each.held), each) if isinstance(each, OnDevice) else None,
                     (args, kwargs))  # fmt: skip
            device = next(iter(here), None)

            def wrap(each):
                if not isinstance(each, torch.Tensor) or device is None:
                    return each
                return originals[id(each)] if id(each) in originals else OnDevice(each, device)

            return tree_map(wrap, found)

        return launch

    special = {"Choice", "parts_for", "INTERPRETED", "run_of_blocks"}
    kernels = {name: value if name in special else kernel(value) for name, value in vars(reference.KERNELS).items()}
    return SimpleNamespace(**kernels)
