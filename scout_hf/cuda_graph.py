"""A CUDA graph: what is launched once while it is captured, and launched as a whole by each replay."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch


class CudaGraph:
    """A CUDA graph, captured on ``stream``."""

    def __init__(self, device: torch.device, stream: Any = None):
        self.device, self._stream = device, stream
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], Any], join: Callable[[], None]) -> Any:
        """Capture what ``run`` and then ``join`` launch. Tensors that ``run`` returns are filled by ``replay``."""
        pool, before = torch.cuda.graph_pool_handle(), torch.cuda.current_stream(self.device)
        # Relaxed, since kernels may be loaded at their first launch, which is here.
        how = {"pool": pool, "stream": self._stream, "capture_error_mode": "relaxed"}
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(self._graph, **how):
                try:
                    result = run()
                finally:
                    join()
        except BaseException:
            # torch before 2.12 does not clean up after a failed capture.
            torch.cuda.set_stream(before)
            with contextlib.suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.device.index, pool)
            raise
        return result

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()
