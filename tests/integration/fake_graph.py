"""What a CUDA graph does, on the CPU: the operations of a step are written down with their tensors and done again.

Python is not run again, numbers of the host stay what they were, and what no graph may hold is an error: reading a
number back.
"""

from __future__ import annotations

import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.triton import reference

FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select")
_now: list[FakeGraph] = []


class _Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.graph.inside:
            name = func.__name__.split(".")[0]
            if name in FORBIDDEN:
                raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
            self.graph.log.append((func, args, kwargs, out))
        return out


class FakeGraph:
    """Stands for :class:`scout_hf.cuda_graph.CudaGraph`; a capture runs the step, so that the first replay does not."""

    made: list[FakeGraph] = []

    def __init__(self, device, stream=None):
        self.log, self.inside, self.replays = [], 0, 0
        self.made.append(self)

    def capture(self, run, join):
        _now.append(self)
        try:
            with _Recorder(self):
                result = run()
                join()
        finally:
            _now.pop()
        return result

    def replay(self):
        self.replays += 1
        if self.replays == 1:
            return
        for func, args, kwargs, out in self.log:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class FakeFill(FakeGraph):
    """The graphs behind a step that fills a block."""

    made: list[FakeGraph] = []

    def capture(self, run, join):
        """Without planted errors inside: it stands for a replay too, which a device does as a whole or not at all."""
        tracing = sys.gettrace()
        sys.settrace(None)
        try:
            return super().capture(run, join)
        finally:
            sys.settrace(tracing)


def recorded(function):
    """A kernel: one entry of the log, whatever it does inside."""

    def launch(*args, **kwargs):
        if not _now:
            return function(*args, **kwargs)
        graph = _now[-1]
        graph.inside += 1
        try:
            out = function(*args, **kwargs)
        finally:
            graph.inside -= 1
        graph.log.append((function, args, kwargs, out))
        return out

    return launch


LAUNCHED = (
    "attend_blocks",
    "merge",
    "choose",
    "plan_recall",
    "copy_blocks",
    "adopt_block",
    "append_token",
    "encode",
    "move_block",
    "post",
    "wait",
    "rms_norm",
    "rotate",
    "silu_product",
)


def install(monkeypatch):
    """Graphs on the CPU, of the kernels' references."""
    for name in LAUNCHED:
        monkeypatch.setattr(reference.KERNELS, name, recorded(getattr(reference.KERNELS, name)))
    FakeGraph.made, FakeFill.made = [], []
    monkeypatch.setattr("scout_hf.graph.CudaGraph", FakeGraph)
    monkeypatch.setattr("scout_hf.graph_fill.CudaGraph", FakeFill)
    monkeypatch.setattr("scout_hf.graph.can_capture", lambda device: True)
    return FakeGraph
