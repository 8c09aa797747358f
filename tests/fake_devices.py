"""Tensors that claim to be on one of several GPUs, compute on the CPU, and mix as little as on real ones.

``tests/fake_cuda.py`` stands in for streams, events, pinned memory and launches of kernels.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
# Copies cross devices.
CROSSING = {aten._to_copy.default, aten.copy_.default}
# The second argument may lie on the CPU.
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor}
CPU = torch.device("cpu")


class MixedDevices(RuntimeError):
    """What a real device would not compute."""


class Pinned:
    """Host memory that devices can read: where it begins, and how long it is."""

    spans: dict[int, int] = {}

    @classmethod
    def add(cls, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        cls.spans[storage.data_ptr()] = storage.nbytes()
        return tensor

    @classmethod
    def holds(cls, address: int) -> bool:
        return any(first <= address < first + size for first, size in cls.spans.items())


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

    @property
    def is_meta(self):
        return False

    def __repr__(self):
        return f"OnDevice({self.device}, {self.held!r})"

    def record_stream(self, stream):
        if stream.device != self.device:
            # CUDA says nothing and guards the memory against the wrong work.
            raise MixedDevices(f"memory on {self.device} kept for a stream of {stream.device}")

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
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            # Of a list torch's own code makes an index "where the tensor is".
            listed = args[1] if isinstance(args[1], tuple) else (args[1],)
            listed = tuple(torch.as_tensor(each) if isinstance(each, list) else each for each in listed)
            args = (args[0], listed, *args[2:])
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def tensors(*given):
    """All tensors in there."""
    found, todo = [], list(given)
    while todo:
        each = todo.pop()
        if isinstance(each, torch.Tensor):
            found.append(each)
        elif isinstance(each, (tuple, list)):
            todo += each
        elif isinstance(each, dict):
            todo += each.values()
    return found


def unwrapped(given):
    """The same with what is held on the CPU."""
    if isinstance(given, OnDevice):
        return given.held
    if isinstance(given, torch.Tensor) or not isinstance(given, (tuple, list, dict)):
        return given
    if type(given) in (tuple, list):
        return type(given)(map(unwrapped, given))
    return tree_map(lambda each: each.held if isinstance(each, OnDevice) else each, given)


def wrapped(found, device, *given):
    """Results as tensors of that device; one that an operand holds is that operand, which was changed in place."""
    if device is None or device.type != "cuda":
        return found
    same = {id(each.held): each for each in tensors(*given) if isinstance(each, OnDevice)}

    def wrap(each):
        if not isinstance(each, torch.Tensor):
            return each
        return same[id(each)] if id(each) in same else OnDevice(each, device)

    return wrap(found) if isinstance(found, torch.Tensor) else tree_map(wrap, found)


def device_of(func, args, kwargs):
    """Where an operation's results go: the device of its operands, which is one, or the one asked for."""
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if wanted == torch.device("cuda"):
        wanted = torch.device("cuda", torch.cuda.current_device())
    if func in CROSSING:
        return wanted or args[0].device
    given = tensors(args, kwargs)
    if func in INDEXING and args[0].device.type != "cpu":
        given = [*tensors(args[0], args[2:], kwargs), *(each for each in tensors(args[1]) if each.device != CPU)]
    # A number on the CPU goes with any device.
    devices = {each.device for each in given if each.dim() or each.device != CPU}
    if len(devices) > 1:
        raise MixedDevices(f"{func} of tensors on {sorted(map(str, devices))}")
    return wanted or next(iter(devices), None)


def run(func, args, kwargs):
    """The operation on the CPU, its results where they would be."""
    device = device_of(func, args, kwargs)
    plain = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if plain.get("device") is not None:
        plain["device"] = CPU
    found = func(*unwrapped(args), **unwrapped(plain))
    if kwargs.get("pin_memory"):
        if device is not None and device.type == "cuda":
            raise MixedDevices("only memory of the CPU can be pinned")
        Pinned.add(found)
    return wrapped(found, device, args, kwargs)


class FakeDevices(TorchDispatchMode):
    """Also what is made from nothing lands where it is wanted."""

    # With this one torch does not look for a driver when a GPU is named.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})
